"""The job file is what it was reviewed to be, and its shell does what it says."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_prolong.config.commands import hydra_override
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.launch.slurm import render_sbatch
from nemo_prolong.plan.time_limits import with_job_limits
from nemo_prolong.records.run_directory import RunDirectory

GOLDEN = Path(__file__).with_name("stage2.sbatch")
TYPED = ["+exp=stage2", "parent=runs/stage 1", "cluster.partition=h100", "cluster.time_limit=12:00:00"]


CHECKOUT = str(CONFIG_DIR.parent)


def render(*overrides: str, directory: Path = Path("/projects/long context")) -> str:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = load(compose("train", list(overrides)), RunConfig)
    return render_sbatch(with_job_limits(cfg, RunDirectory(cfg.run_dir)), overrides, directory)


def directives(job: str) -> list[list[str]]:
    """Return the words of the lines that sbatch reads, split as it does: up to the first line that is a command."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), job.splitlines()))
    return [shlex.split(line.removeprefix("#SBATCH"), comments=True) for line in lines if line.startswith("#SBATCH")]


def rank_command(job: str) -> list[str]:
    """Return the words that the job hands to each rank, as bash reads them."""
    line = next(line for line in job.splitlines() if "scripts/train.py" in line)
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line.strip().removesuffix('&')}"], capture_output=True)
    return printed.stdout.decode().split("\0")[:-1]


def test_the_job_of_stage_2_is_the_reviewed_one():
    assert render(*TYPED).replace(CHECKOUT, "/checkout") == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("name", "job_name"),
    [("my run #2", "my-run-2"), ("a%j", "a-j"), ("-x", "x"), ('it\'s "q"', "it-s-q"), ("$HOME/`id`", "HOME-id")],
)
def test_sbatch_reads_one_word_a_line_whatever_the_name(name: str, job_name: str) -> None:
    job = render("+exp=stage2", hydra_override("name", name))
    words = directives(job)
    assert all(len(line) == 1 for line in words)
    assert [f"--job-name={job_name}"] in words and [f"--output={job_name}-%j.log"] in words
    # Where a line of the name could become a directive of its own.
    assert len(words) == len(directives(render("+exp=stage2")))
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_ranks_get_what_was_typed_whatever_it_is(text: str) -> None:
    assume(text != "???")
    override = hydra_override("model.license", text)
    assert rank_command(render("+exp=stage2", override)) == [f"{CHECKOUT}/scripts/train.py", "+exp=stage2", override]


def test_the_job_starts_where_its_paths_begin(tmp_path: Path) -> None:
    directory = tmp_path / "it's here"
    directory.mkdir()
    job = render("+exp=stage2", "runs_dir=out", directory=directory)
    (change,) = (line for line in job.splitlines() if line.startswith("cd "))
    (run_dir,) = (line for line in job.splitlines() if line.startswith("run_dir="))
    shown = subprocess.run(["bash", "-c", f"{change}; {run_dir}; pwd; echo $run_dir"], cwd="/", capture_output=True)
    assert shown.stdout.decode().splitlines() == [str(directory), f"{directory}/out/stage2"]


def test_an_image_is_handed_to_the_container_runtime():
    assert " --container-image=registry#team/prolong:1 bash" in render(
        "+exp=stage2", "cluster.container_image='registry#team/prolong:1'"
    ).replace("'registry#team/prolong:1'", "registry#team/prolong:1")


def test_the_job_file_is_valid_bash(tmp_path):
    job = tmp_path / "job"
    job.write_text(render(*TYPED))
    subprocess.run(["bash", "-n", str(job)], check=True)


@pytest.fixture
def cluster(tmp_path):
    """A directory of stand-ins for srun and scontrol, and the environment of a job that uses them."""
    commands = tmp_path / "bin"
    commands.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-8]",
    }
    write(commands / "scontrol", 'echo "$@" >> scontrol.log; [ "$1" != show ] || printf "node1\\nnode2\\n"')
    (tmp_path / "job").write_text(render("+exp=stage2", directory=tmp_path))
    return tmp_path, environment


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_the_job_ends_with_the_code_and_is_requeued_after_a_save(code, requeued, cluster):
    directory, environment = cluster
    write(directory / "bin" / "srun", f'echo "$MASTER_ADDR $MASTER_PORT" > address; exit {code}')
    done = subprocess.run(["bash", "job"], cwd=directory, env=environment, check=False)
    assert done.returncode == code
    assert ("requeue 7" in (directory / "scontrol.log").read_text()) == requeued
    assert (directory / "address").read_text() == "node1 20007\n"


HANGS = "echo stacks > runs/stage2/stacks.rank1.txt"
SAVES = "mkdir -p runs/stage2/checkpoints/step_00000100"


@pytest.mark.parametrize(
    ("ranks", "code", "requeued"),
    [
        (f"{SAVES}; {HANGS}", 76, True),
        (f"{SAVES}; {HANGS}", 137, True),
        (HANGS, 76, False),
        (SAVES, 137, False),
        (f"{SAVES}; {HANGS}", 0, False),
    ],
    ids=["saved, then hung", "one was killed", "hung before a save", "killed without a hang", "went well in the end"],
)
def test_a_job_whose_ranks_hang_is_requeued_if_it_got_on(ranks, code, requeued, cluster):
    directory, environment = cluster
    write(directory / "bin" / "srun", f"{ranks}; exit {code}")
    # What an earlier job of this run left says nothing about this one.
    old = directory / "runs" / "stage2" / "checkpoints" / "step_00000050"
    old.mkdir(parents=True)
    (directory / "runs" / "stage2" / "stacks.rank0.txt").touch()
    for path in (old, old.parents[1] / "stacks.rank0.txt"):
        os.utime(path, (1e9, 1e9))
    done = subprocess.run(["bash", "job"], cwd=directory, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert ("requeue 7" in (directory / "scontrol.log").read_text()) == requeued
    assert (f"ranks hung, see {directory}/runs/stage2/stacks.rank*.txt" in done.stderr) == requeued


def test_the_signal_reaches_the_ranks_and_the_job_waits(cluster):
    directory, environment = cluster
    saving = "trap 'sleep 0.3; touch saved; exit 75' USR1; touch running; while :; do sleep 0.05; done"
    write(directory / "bin" / "srun", saving)
    job = subprocess.Popen(["bash", "job"], cwd=directory, env=environment)
    deadline = time.monotonic() + 20
    while not (directory / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    assert (directory / "saved").exists()
    assert (directory / "scontrol.log").read_text().endswith("requeue 7\n")


def test_every_rank_is_told_its_place(cluster):
    directory, environment = cluster
    write(directory / "bin" / "srun", 'shift 2; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=64 exec "$@"')
    write(directory / "bin" / "python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $*" > rank')
    subprocess.run(["bash", "job"], cwd=directory, env=environment, check=True)
    assert (directory / "rank").read_text() == f"9 1 64 {CHECKOUT}/scripts/train.py +exp=stage2\n"


def test_the_launch_script_prints_the_job(tmp_path):
    script = CONFIG_DIR.parent / "scripts" / "launch.py"
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "mine.yaml").write_text("# @package _global_\ndefaults: [stage2]\nname: mine\n")
    typed = ["--config-dir", "conf", "+exp=mine"]
    done = subprocess.run(
        [sys.executable, str(script), *typed], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    # The experiments of a user are found from anywhere.
    assert rank_command(done.stdout) == [
        f"{CHECKOUT}/scripts/train.py",
        "--config-dir",
        f"{tmp_path}/conf",
        "+exp=mine",
    ]
    assert f"\ncd {tmp_path}\n" in done.stdout
