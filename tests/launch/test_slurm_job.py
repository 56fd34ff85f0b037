"""A job on two nodes that are emulated: submitted, broken twice by one node, moved off it, stopped, and finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from tests.support import fake_slurm
from tests.support.launcher_variables import without_launcher
from tests.support.recipe_tools import STEPS, write_recipe_data
from tests.support.tiny import read_metrics, write_plain_tokenizer
from tests.support.train_command import train_arguments
from tests.support.turns import turn

pytestmark = [pytest.mark.launch, pytest.mark.distributed, pytest.mark.timeout(1500)]

TIMEOUT_SECONDS = 600
FIGURES = ("step", "loss", "grad_norm", "target_tokens", "consumed_train_tokens")
ON_TWO_NODES = ("parallelism.num_nodes=2", "parallelism.ranks_per_node=1", "checkpoint.save_interval_steps=2")


class Cluster:
    """The emulated cluster and one directory that all its nodes share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "slurm"
        self.environment = without_launcher() | fake_slurm.install(directory / "bin", self.state)
        self.environment["OMP_NUM_THREADS"] = "1"
        self.data = write_recipe_data(directory / "data")
        write_plain_tokenizer(self.data / "tokenizer")

    def submit(self, name: str, *more: str) -> Path:
        """Submit a stage, and return the directory of the job."""
        arguments = train_arguments(self.directory, self.data, name, *ON_TWO_NODES, *more)[1:]
        command = [sys.executable, str(CONFIG_DIR.parent / "scripts" / "launch.py"), *arguments, "launch.submit=true"]
        done = subprocess.run(command, cwd=self.directory, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self.state / "jobs" / done.stdout.split()[-1]

    def written(self) -> str:
        """Return the end of what the jobs wrote."""
        return "\n".join(log.read_text()[-4000:] for log in sorted(self.directory.glob("*.log")))

    def wait(self, job: Path, *states: str) -> str:
        """Return the state of a job when it is one of these, or one that it stays in."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (state := (job / "state").read_text()) in ("PENDING", "RUNNING") and state not in states:
            assert time.monotonic() < deadline, self.written()
            time.sleep(0.05)
        return state

    def wait_for_steps(self, name: str, steps: int) -> None:
        """Wait until so many steps are on record."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        metrics = self.directory / name / "metrics.jsonl"
        while not metrics.exists() or len(read_metrics(metrics.parent)) < steps:
            assert time.monotonic() < deadline, self.written()
            time.sleep(0.02)

    def wait_for_requeues(self, count: int) -> None:
        """Wait until jobs were requeued so often."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while sum(call.startswith("scontrol requeue") for call in self.calls()) < count:
            assert time.monotonic() < deadline, self.written()
            time.sleep(0.05)

    def calls(self) -> list[str]:
        """Return what was asked of Slurm."""
        return (self.state / "calls").read_text().splitlines()

    def end(self) -> None:
        """End what a failed test left."""
        for path in self.state.glob("jobs/*/pids/*"):
            with open(path) as file:
                pid = int(file.read())
            if Path(f"/proc/{pid}/cmdline").exists() and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An emulated cluster of three nodes."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    with turn():
        yield cluster
        cluster.end()


def test_a_job_leaves_the_node_that_failed_twice_and_loses_nothing(cluster: Cluster) -> None:
    whole = cluster.submit("whole")
    assert cluster.wait(whole) == "COMPLETED", cluster.written()

    job = cluster.submit("broken")
    for restart in range(2):
        cluster.wait_for_steps("broken", 3 + 2 * restart)
        assert (job / "nodes").read_text() == "127.0.0.1,127.0.0.2"
        os.kill(int((job / "pids" / "1").read_text()), signal.SIGKILL)
        cluster.wait_for_requeues(restart + 1)
    cluster.wait_for_steps("broken", 8)
    assert (job / "nodes").read_text() == "127.0.0.1,127.0.0.3"
    os.kill(int((job / "batch").read_text()), signal.SIGUSR1)
    assert cluster.wait(job) == "COMPLETED", cluster.written()

    requeued = [call for call in cluster.calls() if call.startswith(("scontrol requeue", "scontrol update"))]
    number = job.name
    assert requeued == [
        f"scontrol requeue {number}",
        f"scontrol requeue {number}",
        f"scontrol update JobId={number} ExcNodeList=127.0.0.2",
        f"scontrol requeue {number}",
    ]
    events = [json.loads(line) for line in (cluster.directory / "broken/events.jsonl").read_text().splitlines()]
    named = [event["detail"] for event in events if event["event"] in ("node_failed", "node_excluded")]
    assert named == [
        "127.0.0.2: rank 1 ended first: Killed",
        "127.0.0.2: rank 1 ended first: Killed",
        f"127.0.0.2 was named in 2 failures of job {number}",
    ]
    assert [event["event"] for event in events].count("stopped_by_signal") == 1
    figures, others = (
        [[record[key] for key in FIGURES] for record in read_metrics(cluster.directory / name)]
        for name in ("whole", "broken")
    )
    assert [record[0] for record in figures] == list(range(1, STEPS + 1))
    assert figures == others


def test_a_job_of_a_complete_stage_ends_at_once_with_success(cluster: Cluster) -> None:
    before = read_metrics(cluster.directory / "whole")
    job = cluster.submit("whole")
    assert cluster.wait(job) == "COMPLETED", cluster.written()
    log = (cluster.directory / f"whole-{job.name}.log").read_text()
    assert f"{cluster.directory}/whole is complete already: {STEPS} of {STEPS} steps" in log
    assert read_metrics(cluster.directory / "whole") == before
