"""SIGTERM and SIGUSR1 to any rank: finish the step, save on all ranks, stop."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.distributed.ranks import agree_any
from nemo_prolong.records.run_log import record_event

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(Callback):
    """Stops training at the end of the step in which any rank was asked to.

    Ranks agree by one small reduction a step. Comes after the checkpoint writer in the list of callbacks.

    Args:
        writer: Saves the state before the stop.
        run_dir: Where ``events.jsonl`` lies.

    Attributes:
        stopped: Whether training was stopped before its last step.
    """

    def __init__(self, writer: CheckpointWriter, run_dir: Path) -> None:
        self.writer = writer
        self.run_dir = run_dir
        self.stopped = False
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals from now on; outside the main thread Python allows no handlers, and nothing happens."""
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

    def on_train_start(self, *args: Any) -> None:
        """Take the signals back from Lightning, which ends the process at once."""
        self.listen()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Save and stop if any rank was asked to.

        Raises:
            CheckpointError: On every rank, if the state could not be saved.
        """
        if not agree_any(self._received is not None) or trainer.global_step >= trainer.max_steps:
            return
        if self._received is not None:
            log.warning("rank %d received %s", torch.distributed.get_rank(), self._received.name)
        self.writer.save_before_stop(trainer)
        if trainer.is_global_zero:
            log.warning("stopped after step %d, as asked; the same command continues", trainer.global_step)
            record_event(self.run_dir, trainer.global_step, "stopped_by_signal", "state saved")
        self.stopped = True
        trainer.should_stop = True
