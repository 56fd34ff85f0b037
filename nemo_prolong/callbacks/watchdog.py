"""A rank that makes no progress for too long says where it stands and ends, so that the launcher can start anew."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_prolong.errors import EXIT_HUNG
from nemo_prolong.records.run_log import record_event

log = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0
"""The file system that the report is written to may be what the process hangs on."""


class HangWatchdog(Callback):
    """Ends this process with ``EXIT_HUNG`` when no step, validation or save ends within a time.

    The rank that hangs and those that wait for it in a collective look alike from inside: each writes the stacks of all
    its threads to ``stacks.rankN.txt`` in the run directory, and those differ. A rank that is stopped by SIGSTOP writes
    nothing; its file is missing.

    Args:
        hang_seconds: The time; None never ends anything.
        run_dir: Run directory.
    """

    def __init__(self, hang_seconds: float | None, run_dir: Path) -> None:
        self.hang_seconds = hang_seconds
        self.run_dir = run_dir
        self._last_progress = time.monotonic()
        self._step = 0
        self._rank = 0
        # Made when training starts: NeMo copies its callbacks, and an event cannot be copied.
        self._ended: threading.Event | None = None

    def _progress(self, step: int | None = None) -> None:
        self._last_progress = time.monotonic()
        self._step = self._step if step is None else step

    def on_train_start(self, trainer: Any, *args: Any) -> None:
        """Start to watch."""
        self._progress(trainer.global_step)
        self._rank = trainer.global_rank
        if self.hang_seconds is not None:
            self._ended = threading.Event()
            threading.Thread(
                target=self._watch, args=(self._ended, self.hang_seconds), name="hang watchdog", daemon=True
            ).start()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """A step ended, and with it a save that was due."""
        self._progress(trainer.global_step)

    def on_validation_batch_end(self, *args: Any) -> None:
        """A part of a validation ended."""
        self._progress()

    def on_train_end(self, *args: Any) -> None:
        """Stop watching."""
        if self._ended is not None:
            self._ended.set()

    def on_exception(self, *args: Any) -> None:
        """Stop watching: the process is about to end by itself."""
        self.on_train_end()

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

    def _report(self) -> None:
        stacks = self.run_dir / f"stacks.rank{self._rank}.txt"
        detail = f"rank {self._rank} made no progress for {self.hang_seconds:g} s; its stacks are in {stacks.name}"
        log.error("%s", detail)
        record_event(self.run_dir, self._step, "hang", detail)
        with stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
