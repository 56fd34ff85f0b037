"""One command under every launcher: four ranks on one node, or on two that are emulated, train to the same bits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from nemo_prolong.errors import EXIT_PREEMPTED
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.launcher_variables import slurm_task, without_launcher
from tests.support.recipe_tools import STEPS, write_recipe_data
from tests.support.tiny import read_metrics, write_plain_tokenizer
from tests.support.train_command import train_arguments
from tests.support.turns import turn

pytestmark = [pytest.mark.launch, pytest.mark.distributed, pytest.mark.timeout(3600)]

TIMEOUT_SECONDS = 1500
FIGURES = ("step", "loss", "grad_norm", "target_tokens", "consumed_train_tokens")
# DP 2 x CP 2: a batch of 4 rows takes 2 micro-batches.
LAYOUT = ("parallelism.context_parallel_size=2", "train.global_batch_size=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and a tokenizer; runs lie beside them."""
    root = write_recipe_data(tmp_path_factory.mktemp("nodes") / "data")
    write_plain_tokenizer(root / "tokenizer")
    return root


class Launch:
    """Processes that train one run together, as an operator sees them."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start one of them. What it writes goes to a file beside the run."""
        log = self.run.with_suffix(f".{len(self.processes)}.log").open("ab")
        with log:
            self.processes.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def wait(self) -> list[int]:
        """Return the exit codes."""
        return [process.wait(TIMEOUT_SECONDS) for process in self.processes]

    def wait_for_steps(self, steps: int) -> None:
        """Wait until so many steps are on record."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (self.run / "metrics.jsonl").exists() or len(read_metrics(self.run)) < steps:
            assert self.processes[0].poll() is None and time.monotonic() < deadline, self.written()
            time.sleep(0.05)

    def written(self) -> str:
        """Return the end of what the processes wrote."""
        return "\n".join(log.read_text()[-2000:] for log in sorted(self.run.parent.glob(f"{self.run.name}.*.log")))


@pytest.fixture
def launch(data: Path) -> Iterator[Callable[[str], Launch]]:
    """A function from the name of a run to its launch. What is left of it ends with the test."""
    launches: list[Launch] = []

    def make(name: str) -> Launch:
        launches.append(Launch(data.parent / name))
        return launches[-1]

    with turn():
        yield make
        for process in (process for each in launches for process in each.processes):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one_node(data: Path) -> Path:
    """A run that the script's own ranks trained: asked to stop on the way, and started again."""
    run = data.parent / "alone"
    arguments = train_arguments(data.parent, data, run.name, *LAYOUT, "parallelism.ranks_per_node=4")
    command, environment = [sys.executable, *arguments], without_launcher()
    with turn():
        first = Launch(run)
        first.start(command, environment)
        first.wait_for_steps(3)
        first.processes[0].send_signal(signal.SIGTERM)
        assert first.wait() == [EXIT_PREEMPTED], first.written()
        assert 3 <= len(read_metrics(run)) < STEPS
        second = Launch(run)
        second.start(command, environment)
        assert second.wait() == [0], second.written()
    return run


def same_run(run: Path, other: Path) -> None:
    """Compare the figures of two runs to the last bit."""
    figures, others = ([[record[key] for key in FIGURES] for record in read_metrics(each)] for each in (run, other))
    assert [record[0] for record in figures] == list(range(1, STEPS + 1))
    assert figures == others


def test_the_script_starts_its_ranks_and_passes_a_stop_on(one_node: Path) -> None:
    manifest = StageManifest.read(one_node)
    assert (manifest.status, manifest.world_size) == ("complete", 4)
    events = (one_node / "events.jsonl").read_text()
    assert "stopped_by_signal" in events and "resumed" in events


def test_two_agents_of_torchrun_train_as_one_node(one_node: Path, data: Path, launch) -> None:
    nodes = launch("agents")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    agent = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-id=7"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"),
    ]
    for _ in range(2):
        nodes.start([*agent, *train_arguments(data.parent, data, nodes.run.name, *LAYOUT)], without_launcher())
    assert nodes.wait() == [0, 0], nodes.written()
    assert StageManifest.read(nodes.run).world_size == 4
    same_run(nodes.run, one_node)


def test_tasks_of_srun_on_two_nodes_train_as_one_node(one_node: Path, data: Path, launch) -> None:
    nodes = launch("tasks")
    command = [sys.executable, *train_arguments(data.parent, data, nodes.run.name, *LAYOUT)]
    for rank in range(4):
        nodes.start(command, without_launcher() | slurm_task(rank, nodes=2, tasks_per_node=2, job=os.getpid()))
    assert nodes.wait() == [0] * 4, nodes.written()
    assert StageManifest.read(nodes.run).world_size == 4
    same_run(nodes.run, one_node)
