"""scripts/train.py refuses what is wrong on disk in a second, with one line, before torch is imported."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from tests.support.tiny import write_data

TRAIN = CONFIG_DIR.parent / "scripts" / "train.py"
PROBE = f"""
import runpy, sys
sys.argv[0] = {str(TRAIN)!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert "torch" not in sys.modules and "nemo_prolong.stages.run" in sys.modules
"""


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data directory with the row sets of the miniature's stage 1."""
    root = write_data(tmp_path / "data", rows=6, seq_length=2048)
    for name in ("code_by_repo-2048", "reference-2048", "docs-2048", "validation-2048"):
        shutil.copytree(root / "rows", root / name)
    return root


def run_train(directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run the script in ``directory``; return the process and the processor seconds it took."""
    launcher = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "HYDRA_FULL_ERROR")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_missing_parents_and_data_are_one_line_and_a_code(prepared, tmp_path):
    directory = tmp_path / "work"
    directory.mkdir()
    refusals = {
        str(prepared): (
            4,
            "parent=nowhere: the parent run does not exist. Train the parent stage first, or name its run.\n",
        ),
        "absent": (
            3,
            "data.root=absent: the data directory does not exist. "
            "Write it with: python scripts/prepare_data.py +exp=data/NAME output=absent\n",
        ),
    }
    for root, (code, message) in refusals.items():
        done, seconds = run_train(directory, "+exp=mini/stage1", "parent=nowhere", f"data.root={root}")
        assert (done.returncode, done.stdout, done.stderr) == (code, "", message)
        # Processor time, so that a busy machine does not fail the test.
        assert seconds < 3.0
    assert not list(directory.iterdir())
