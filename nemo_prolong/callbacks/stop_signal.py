"""A rank that gets SIGTERM or SIGUSR1 finishes the step, then all ranks save and stop."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.protocol import Callback, TrainingLoop
from nemo_prolong.distributed.ranks import agree_any
from nemo_prolong.records.run_directory import RunDirectory

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(Callback):
    """Stops training at the end of the step in which any rank was asked to.

    Ranks agree by one small reduction a step.

    Args:
        writer: Saves the state before the stop.
        run: Run directory.

    Attributes:
        stopped: Whether training was stopped before its last step.
    """

    # A step that ends by a stop is recorded, and saved if it was due.
    after = (CheckpointWriter,)

    def __init__(self, writer: CheckpointWriter, run: RunDirectory) -> None:
        self.writer = writer
        self.run = run
        self.stopped = False
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals from now on. Outside the main thread Python allows no handlers, and nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            previous = signal.signal(number, self._receive)
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Take the signals back from the loop, which may have handlers that end the process at once."""
        self.listen()

    def on_step_end(self, loop: TrainingLoop) -> None:
        """Save and stop if any rank was asked to.

        Raises:
            CheckpointError: On every rank, if the state could not be saved.
        """
        if not agree_any(self._received is not None) or loop.step >= loop.train_iters:
            return
        if self._received is not None:
            log.warning("rank %d received %s", loop.rank, self._received.name)
        self.writer.save_before_stop(loop)
        if loop.rank == 0:
            log.warning("stopped after step %d, as asked; the same command continues", loop.step)
            self.run.record_event(loop.step, "stopped_by_signal", "state saved")
        self.stopped = True
        loop.stop()
