"""A recipe becomes jobs that wait for each other, and a part that fails keeps the others from running."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from tests.support import fake_slurm
from tests.support.launcher_variables import without_launcher

pytestmark = [pytest.mark.launch, pytest.mark.distributed]

PARTS = ("stage1", "stage2", "sft", "sft-evaluate", "sft-export")
PYTHON = """\
#!/bin/bash
for word in "$@"; do case "$word" in +exp=*|*/evaluate.py|*/export.py) part=${word##*/}; part=${part#+exp=};; esac; done
echo "$part" >> ran
[ "$part" != "$(cat fails 2>/dev/null)" ] || exit 4
"""


@pytest.fixture
def cluster(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """An emulated cluster whose python does nothing but say which part it is."""
    environment = without_launcher() | fake_slurm.install(tmp_path / "bin", tmp_path / "slurm")
    python = tmp_path / "python" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path, environment | {"PATH": f"{python.parent}:{environment['PATH']}"}


def submit(directory: Path, environment: dict[str, str]) -> list[str]:
    """Submit the whole recipe on nodes of one rank, and return the state in which each job ends."""
    small = 'overrides=["parallelism=single","runs_dir=out","faults.planned_step_seconds=9"]'
    typed = ["recipe=prolong", "parent=hf:DIR", small, "cluster.partition=h100", "launch.submit=true"]
    script = str(CONFIG_DIR.parent / "scripts" / "launch.py")
    done = subprocess.run(
        [sys.executable, script, *typed], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if ": job " in line]
    assert [line.partition(":")[0] for line in told] == list(PARTS)
    jobs = [directory / "slurm" / "jobs" / line.split()[-1] for line in told]
    deadline = time.monotonic() + 120
    while any((job / "state").read_text() in ("PENDING", "RUNNING") for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [(job / "state").read_text() for job in jobs]


def test_each_job_of_a_chain_waits_for_the_one_before_it(cluster):
    directory, environment = cluster
    assert submit(directory, environment) == ["COMPLETED"] * 5
    assert (directory / "ran").read_text().split() == ["stage1", "stage2", "sft", "evaluate.py", "export.py"]
    (first, *later) = (directory / "slurm" / "calls").read_text().splitlines()
    assert "--dependency" not in first
    assert [call.split("--dependency=")[1].split()[0] for call in later] == [f"afterok:{job}" for job in range(1, 5)]
    kept = sorted(path.relative_to(directory / "out").as_posix() for path in directory.glob("out/*/launch/*.s*"))
    assert kept == [
        *("sft/launch/chain.sh", "sft/launch/sft-evaluate.sbatch", "sft/launch/sft-export.sbatch"),
        *("sft/launch/sft.sbatch", "stage1/launch/stage1.sbatch", "stage2/launch/stage2.sbatch"),
    ]
    stage1 = (directory / "out/stage1/launch/stage1.sbatch").read_text()
    assert "resume.when_complete=succeed" in stage1 and "#SBATCH --partition=h100" in stage1
    assert "launch.submit" not in stage1


def test_jobs_after_one_that_fails_never_run_until_all_come_again(cluster):
    directory, environment = cluster
    (directory / "fails").write_text("stage2")
    assert submit(directory, environment) == ["COMPLETED", "FAILED 4", *["CANCELLED"] * 3]
    assert (directory / "ran").read_text().split() == ["stage1", "stage2"]
    (directory / "fails").unlink()
    assert submit(directory, environment) == ["COMPLETED"] * 5
