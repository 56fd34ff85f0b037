"""A rank that makes no progress for too long says where it stands and ends, so that the launcher can start anew."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.protocol import Callback, TrainingLoop
from nemo_prolong.errors import EXIT_HUNG
from nemo_prolong.records.run_directory import RunDirectory

log = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
"""The file system that the report is written to may be what the process hangs on."""


class HangWatchdog(Callback):
    """Ends this process with ``EXIT_HUNG`` when no step, validation or save ends within a time.

    The rank that hangs and those that wait for it in a collective look alike from inside. Each writes the stacks of all
    its threads to ``stacks.rankN.txt`` in the run directory, and those differ. A rank that is stopped by SIGSTOP writes
    nothing. Its file is missing. The first rank that reports records the event.

    Args:
        hang_seconds: The time. With None nothing is ever ended.
        run: Run directory.
    """

    # A save that was due is part of the step.
    after = (CheckpointWriter,)

    def __init__(self, hang_seconds: float | None, run: RunDirectory) -> None:
        self.hang_seconds = hang_seconds
        self.run = run
        self._last_progress = time.monotonic()
        self._step = 0
        self._rank = 0
        # Made when training starts, because NeMo copies what its trainer is made of and an event cannot be copied.
        self._ended: threading.Event | None = None

    def _progress(self, step: int | None = None) -> None:
        self._last_progress = time.monotonic()
        self._step = self._step if step is None else step

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Start to watch."""
        self._progress(loop.step)
        self._rank = loop.rank
        if loop.rank == 0:
            # Of an earlier start of the run.
            self.run.hang_file.unlink(missing_ok=True)
        if self.hang_seconds is not None:
            self._ended = threading.Event()
            threading.Thread(
                target=self._watch, args=(self._ended, self.hang_seconds), name="hang watchdog", daemon=True
            ).start()

    def on_step_end(self, loop: TrainingLoop) -> None:
        """A step ended, and with it a save that was due."""
        self._progress(loop.step)

    def on_validation_batch_end(self, loop: TrainingLoop) -> None:
        """A part of a validation ended."""
        self._progress()

    def on_train_end(self, loop: TrainingLoop) -> None:
        """Stop watching."""
        if self._ended is not None:
            self._ended.set()

    def on_exception(self, loop: TrainingLoop) -> None:
        """Stop watching, because the process is about to end by itself."""
        self.on_train_end(loop)

    def _watch(self, ended: threading.Event, hang_seconds: float) -> None:
        while not ended.wait(min(1.0, hang_seconds / 4)):
            if time.monotonic() - self._last_progress > hang_seconds:
                self._give_up()

    def _give_up(self) -> None:
        try:
            threading.Timer(_REPORT_SECONDS, os._exit, [EXIT_HUNG]).start()
            self._report()
        finally:
            # The main thread is stuck in a call that no exception reaches.
            os._exit(EXIT_HUNG)

    def _is_first(self, detail: str) -> bool:
        """Return whether no other rank has reported.

        All give up at about the same time, and a network file system loses lines that many machines append.
        """
        try:
            with self.run.hang_file.open("x") as file:
                file.write(f"{detail}\n")
        except FileExistsError:
            return False
        return True

    def _report(self) -> None:
        stacks = self.run.stacks_file(self._rank)
        detail = f"rank {self._rank} made no progress for {self.hang_seconds:g} s; its stacks are in {stacks.name}"
        log.error("%s", detail)
        if self._is_first(detail):
            self.run.record_event(self._step, "hang", detail)
        with stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
