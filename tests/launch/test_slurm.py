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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemo_prolong.config.commands import hydra_override
from nemo_prolong.config.compose import CONFIG_DIR, compose
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.launch.parts import LaunchPart
from nemo_prolong.launch.slurm import render_sbatch
from nemo_prolong.plan.time_limits import with_job_limits
from nemo_prolong.records.run_directory import RunDirectory

GOLDEN = Path(__file__).with_name("stage2.sbatch")
TYPED = ["+exp=stage2", "parent=runs/stage 1", "cluster.partition=h100", "cluster.time_limit=12:00:00"]


CHECKOUT = str(CONFIG_DIR.parent)


def render(*overrides: str, directory: Path = Path("/projects/long context")) -> str:
    cfg = compose(RunConfig, "train", overrides)
    cfg = with_job_limits(cfg, RunDirectory(cfg.run_dir))
    return render_sbatch(LaunchPart.of_stage(cfg, overrides), directory)


def directives(job: str) -> list[list[str]]:
    """Return the words of the lines that sbatch reads, split as it does: up to the first line that is a command."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), job.splitlines()))
    return [shlex.split(line.removeprefix("#SBATCH"), comments=True) for line in lines if line.startswith("#SBATCH")]


def rank_command(job: str) -> list[str]:
    """Return the words after python that each rank runs, as bash reads them."""
    line = next(line for line in job.splitlines() if "scripts/train.py" in line).removesuffix(" 2>&3 3>&- &")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line.strip()}"], capture_output=True)
    python, *words = printed.stdout.decode().split("\0")[:-1]
    assert python == "python"
    return words


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


def test_a_container_gets_its_image_mounts_directory_and_variables():
    mounts = "cluster.container_mounts=[/lustre/me:/project,/models:/models:ro]"
    image = "cluster.container_image='registry#team/prolong:1'"
    job = render("+exp=stage2", image, mounts, "cluster.container_workdir=/project", "parent=/models/stage1")
    array = job.partition("container=(\n")[2].partition(")")[0]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {array.replace(chr(10), ' ')}"], capture_output=True)
    assert printed.stdout.decode().splitlines() == [
        "--container-image=registry#team/prolong:1",
        "--container-mounts=/lustre/me:/project,/models:/models:ro",
        "--container-workdir=/project",
        "--container-env=PYTORCH_CUDA_ALLOC_CONF,CUDA_DEVICE_MAX_CONNECTIONS",
    ]
    # The job looks at the host, and the ranks at the image.
    assert "\nlaunch=/lustre/me/runs/stage2/launch\n" in job and "\nrun_dir=/project/runs/stage2\n" in job
    assert "  python /workspace/nemo_prolong/scripts/train.py +exp=stage2" in job


def test_a_job_finds_its_run_in_the_innermost_mount():
    mounts = "cluster.container_mounts=[/lustre/me:/project,/fast:/project/runs]"
    workdir = "cluster.container_workdir=/project"
    job = render("+exp=stage2", "cluster.container_image=a", mounts, workdir)
    assert "\nlaunch=/fast/stage2/launch\n" in job


def test_cpus_memory_and_further_options_are_asked_for():
    job = render(
        "+exp=stage2",
        "cluster.cpus_per_task=14",
        "cluster.memory_per_node=900G",
        'cluster.sbatch_options=["--qos=high"]',
    )
    words = directives(job)
    assert [["--cpus-per-task=14"], ["--mem=900G"], ["--qos=high"]] == [
        line for line in words if line[0].startswith(("--cpus", "--mem", "--qos"))
    ]
    assert "\ncpus=14\n" in job
    assert "\ncpus=$((SLURM_CPUS_ON_NODE / 8))\n" in render("+exp=stage2")


def test_variables_of_the_ranks_are_those_of_the_configuration():
    job = render(
        "+exp=stage2",
        "cluster.environment.NCCL_SOCKET_IFNAME=bond0",
        "cluster.environment.CUDA_DEVICE_MAX_CONNECTIONS=null",
        '+cluster.environment.NCCL_DEBUG="it is $HOME"',
    )
    exported = [line for line in job.splitlines() if line.startswith("export ")]
    assert exported == [
        "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        "export NCCL_SOCKET_IFNAME=bond0",
        "export NCCL_DEBUG='it is $HOME'",
    ]


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
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-8]",
        "SLURM_JOB_NUM_NODES": "8",
        "SLURM_CPUS_ON_NODE": "128",
        "SLURMD_NODENAME": "node1",
    }
    nodes = " ".join(f"node{number}" for number in range(1, 9))
    show = f"[ \"$2\" = job ] && echo ' ReqNodeList=(null) ExcNodeList=(null)' || printf '%s\\n' {nodes}"
    write(commands / "scontrol", f'echo "$@" >> scontrol.log; if [ "$1" = show ]; then {show}; fi')
    (tmp_path / "job").write_text(render("+exp=stage2", directory=tmp_path))
    return tmp_path, environment


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def ranks(directory: Path, body: str) -> None:
    """Have srun do this for the ranks, and nothing for what is asked of the nodes after they have failed."""
    write(directory / "bin" / "srun", f'case "$*" in *--overlap*) exit 0;; esac\n{body}')


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_the_job_ends_with_the_code_and_is_requeued_after_a_save(code, requeued, cluster):
    directory, environment = cluster
    ranks(directory, f"exit {code}")
    done = subprocess.run(["bash", "job"], cwd=directory, env=environment, check=False)
    assert done.returncode == code
    assert ("requeue 7" in calls(directory)) == requeued


def calls(directory: Path) -> list[str]:
    """Return what was asked of scontrol."""
    log = directory / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


HANGS = "echo stacks > runs/stage2/stacks.rank1.txt"
SAVES = "mkdir -p runs/stage2/checkpoints/step_00000100"


@pytest.mark.parametrize(
    ("done", "code", "requeued"),
    [
        (f"{SAVES}; {HANGS}", 76, True),
        (f"{SAVES}; {HANGS}", 137, True),
        (f"for r in {{0..63}}; do {HANGS.replace('rank1', 'rank$r')}; done", 76, False),
        (SAVES, 137, False),
        (f"{SAVES}; {HANGS}", 0, False),
    ],
    ids=["saved, then hung", "one was killed", "hung before a save", "killed without a hang", "went well in the end"],
)
def test_a_job_whose_ranks_hang_is_requeued_if_it_got_on(done, code, requeued, cluster):
    directory, environment = cluster
    ranks(directory, f"{done}; exit {code}")
    # What an earlier job of this run left says nothing about this one.
    old = directory / "runs" / "stage2" / "checkpoints" / "step_00000050"
    old.mkdir(parents=True)
    (directory / "runs" / "stage2" / "stacks.rank0.txt").touch()
    for path in (old, old.parents[1] / "stacks.rank0.txt"):
        os.utime(path, (1e9, 1e9))
    ended = subprocess.run(["bash", "job"], cwd=directory, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == code
    assert ("requeue 7" in calls(directory)) == requeued
    told = f"ranks hung, see {directory}/runs/stage2/stacks.rank*.txt" in ended.stderr
    assert told == ("stacks" in done and code != 0)


FIRST = "echo 'srun: error: node3: task 17: Bus error' >&2; echo 'srun: error: node[1-8]: tasks 0-63: Aborted' >&2"


def test_a_node_that_fails_twice_is_excluded_when_the_job_is_requeued(cluster):
    directory, environment = cluster
    for restart in range(2):
        ranks(directory, f"{SAVES}; {FIRST}; exit 135")
        restarted = environment | {"SLURM_RESTART_COUNT": str(restart)}
        done = subprocess.run(["bash", "job"], cwd=directory, env=restarted, capture_output=True, text=True)
        assert done.returncode == 135
        assert "node3 is to blame: rank 17 ended first: Bus error" in done.stderr
    asked = [call for call in calls(directory) if not call.startswith("show")]
    assert asked == ["requeue 7", "requeue 7", "update JobId=7 ExcNodeList=node3"]
    errors = directory / "runs/stage2/launch"
    assert sorted(path.name for path in errors.glob("errors.*")) == ["errors.7.0.log", "errors.7.1.log"]


def test_nodes_that_the_job_does_without_already_stay_excluded(cluster):
    directory, environment = cluster
    scontrol = directory / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("ExcNodeList=(null)", "ExcNodeList=node[20-22]"))
    (directory / "job").write_text(render("+exp=stage2", "cluster.exclude_after_failures=1", directory=directory))
    ranks(directory, f"{FIRST}; exit 135")
    subprocess.run(["bash", "job"], cwd=directory, env=environment, check=False, capture_output=True)
    assert calls(directory)[-1] == "update JobId=7 ExcNodeList=node[20-22],node3"


def test_a_line_of_the_kernel_names_the_node(cluster):
    directory, environment = cluster
    (directory / "job").write_text(render("+exp=stage2", "cluster.exclude_after_failures=1", directory=directory))
    overlap = 'case "$*" in *--overlap*) shift 4; SLURMD_NODENAME=node5 exec "$@";; esac'
    write(directory / "bin" / "srun", f"{overlap}\n{FIRST}; exit 135")
    late, early = "2100-01-01T00:00:00,1+00:00", "2020-01-01T00:00:00,1+00:00"
    lines = [f"{early} NVRM: Xid (PCI:0000:1b:00): 48, pid=1", f"{late} NVRM: Xid (PCI:0000:1b:00): 79, pid=1"]
    write(directory / "bin" / "dmesg", "\n".join(f"echo '{line}'" for line in lines))
    done = subprocess.run(["bash", "job"], cwd=directory, env=environment, capture_output=True, text=True)
    assert "node5 is to blame: Xid 79 in its kernel's log" in done.stderr
    assert calls(directory)[-1] == "update JobId=7 ExcNodeList=node5"


def test_the_signal_reaches_the_ranks_and_the_job_waits(cluster):
    directory, environment = cluster
    saving = "trap 'sleep 0.3; touch saved; exit 75' USR1; touch running; while :; do sleep 0.05; done"
    ranks(directory, saving)
    job = subprocess.Popen(["bash", "job"], cwd=directory, env=environment)
    deadline = time.monotonic() + 20
    while not (directory / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    assert (directory / "saved").exists()
    assert calls(directory)[-1] == "requeue 7"


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
        # A job that is requeued after its last step has succeeded.
        "resume.when_complete=succeed",
    ]
    assert f"\ncd {tmp_path}\n" in done.stdout
