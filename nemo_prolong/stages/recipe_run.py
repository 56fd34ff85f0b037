"""Run what is left of a recipe, every part in processes of its own.

Nothing is remembered between two starts of the command. What is done is read from ``stage.json`` and the checkpoints.
The ranks are started here and not by torchrun. torchrun ends with 1 whatever its ranks end with, gives them 30 seconds
to save, and leaves them behind when it is killed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import ExportConfig, ModelConfig
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.errors import EXIT_PREEMPTED
from nemo_prolong.stages.recipe_plan import RecipePlan, plan_recipe

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_SECONDS_AFTER_FIRST_FAILURE = 30.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


CheckExport = Callable[[ExportConfig, ModelConfig, int], None]
"""Refuses an export by its configuration, the model and the advertised context, before the model is trained."""


def run_recipe(cfg: RecipeConfig, config_flags: Sequence[str] = (), check_export: CheckExport | None = None) -> None:
    """Train the stages that are left and export. The same command again resumes where it was.

    Args:
        cfg: The recipe.
        config_flags: See ``plan_recipe``.
        check_export: Called for the export if it is not complete; raises what the export would refuse.

    Raises:
        ConfigError: If a stage cannot be composed, or the parents do not make a chain.
        DataError: If rows that a stage needs are missing.
        CheckpointError: If a run directory holds something else.
        ExportError: If the model could not be exported as configured.
        SystemExit: With ``EXIT_PREEMPTED`` if a part was asked to stop, else with the code of the part that failed.
    """
    plan = plan_recipe(cfg, config_flags)
    for number, line in enumerate(plan.describe(), start=1):
        log.info("%d. %s", number, line)
    if check_export is not None and plan.export and not plan.export.is_complete(plan.stages[-1]):
        check_export(plan.export.cfg, plan.stages[-1].cfg.model, plan.advertised_context_length)
    if cfg.dry_run:
        return
    with _children() as children:
        _train(plan, children, cfg.ranks)
        last = plan.stages[-1]
        if plan.export and not plan.export.is_complete(last):
            log.info(plan.export.describe(last))
            children.run("export.py", plan.export.arguments, 1)
    log.info("the recipe is complete: %s", plan.export.cfg.output if plan.export else last.cfg.run_dir)


def _train(plan: RecipePlan, children: _Children, ranks: int) -> None:
    while (number := plan.next_stage()) is not None:
        stage = plan.stages[number]
        log.info(stage.describe())
        children.run("train.py", stage.arguments, ranks)
        if not stage.is_complete:
            log.error("%s ended well and is not complete", stage.cfg.run_dir)
            raise SystemExit(1)


class _Children:
    """The processes of one part at a time, which get the signals that this process gets and die with it."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received: signal.Signals | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember a request to stop. It is handed on from ``_wait``, where no process is just being started."""
        self._received = signal.Signals(number)

    def run(self, script: str, arguments: Sequence[str], ranks: int) -> None:
        """Run a script on some ranks to its end.

        Raises:
            SystemExit: If it did not end well, or a request to stop was received.
        """
        try:
            self._start(script, arguments, ranks)
            code = self._wait()
        finally:
            self.kill()
        if self._received is not None or code == EXIT_PREEMPTED:
            log.warning("stopped; the same command goes on")
            raise SystemExit(EXIT_PREEMPTED)
        if code:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            log.error("%s %s; the same command goes on", shell_command([script, *arguments]), how)
            raise SystemExit(code if code > 0 else 128 - code)

    def _start(self, script: str, arguments: Sequence[str], ranks: int) -> None:
        command = [sys.executable, str(CONFIG_DIR.parent / "scripts" / script), *arguments]
        port = _free_port() if ranks > 1 else 0
        for rank in range(ranks):
            if self._received is None:
                environment = _environment(rank, ranks, port)
                # The parts read nothing, and a terminal must not be shared between ranks.
                self._processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=_die_with(os.getpid())
                    )
                )

    def _wait(self) -> int:
        """Return 0, or the exit status of the first rank that failed. What is left after that is killed in time."""
        first, deadline, handed_on = 0, float("inf"), False
        while None in (codes := [process.poll() for process in self._processes]) and time.monotonic() < deadline:
            if self._received is not None and not handed_on:
                for process in self._processes:
                    process.send_signal(self._received)
                handed_on = True
            if not first and any(codes):
                first, deadline = next(filter(None, codes)), time.monotonic() + _SECONDS_AFTER_FIRST_FAILURE
            time.sleep(_POLL_SECONDS)
        return first or next(filter(None, codes), 0)

    def kill(self) -> None:
        """End what is left, after a failure or an interrupt."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._processes.clear()


@contextmanager
def _children() -> Iterator[_Children]:
    """Receive requests to stop while the parts run. Outside the main thread Python allows no handlers."""
    children = _Children()
    if threading.current_thread() is not threading.main_thread():
        yield children
        return
    previous = {number: signal.signal(number, children.receive) for number in _STOP_SIGNALS}
    try:
        yield children
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a rank. One alone is a plain process, several are what torchrun would start."""
    if ranks == 1:
        return dict(os.environ)
    return {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def _die_with(parent: int) -> Callable[[], None]:
    """Return what has the kernel kill a child when its parent dies. Two processes must not train one run."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
