"""Where metrics go besides ``metrics.jsonl``. These are TensorBoard, Weights & Biases and MLflow.

Training neither waits for a tracker nor stops for one. Each has a thread of its own on rank 0, and what a thread cannot
deliver is dropped after one warning. ``metrics.jsonl`` has everything regardless.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from nemo_prolong.config.schema import RunConfig, TrackerConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.telemetry.mlflow_tracker import MlflowTracker
from nemo_prolong.telemetry.tracker import Figures, TrackedRun, Tracker
from nemo_prolong.telemetry.wandb_tracker import WandbTracker

log = logging.getLogger(__name__)

_QUEUE_RECORDS = 1000
"""Records kept for a tracker that is slow. More are dropped."""

_RETRY_SECONDS = 60.0
"""A tracker that failed is left alone for so long."""

_CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its trackers."""


def check_packages(cfg: TrackerConfig) -> None:
    """Refuse a tracker whose package is missing, on every rank, so that none waits for one that refused.

    Raises:
        ConfigError: With the command that installs it.
    """
    for package, settings in (("wandb", cfg.wandb), ("mlflow", cfg.mlflow)):
        if settings is not None and package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracker.{package}",
                f"needs the package {package}, which is not installed.",
                f"Install it (pip install {package}), or set tracker=tensorboard or tracker=jsonl.",
            )


class Trackers:
    """The trackers of a run, on rank 0.

    Args:
        cfg: The stage.
        directory: Run directory.
        step: Steps done. The first record will be of the next one.
    """

    def __init__(self, cfg: RunConfig, directory: RunDirectory, step: int) -> None:
        run = TrackedRun.of(cfg, directory, step)
        if step == 0:
            run.forget_ids()
        makers: list[tuple[str, Callable[[], Tracker]]] = []
        if cfg.tracker.tensorboard:
            # Needs torch, which whoever only checks packages does without.
            from nemo_prolong.telemetry.tensorboard_tracker import TensorBoardTracker

            makers.append(("tensorboard", lambda: TensorBoardTracker(run)))
        if (wandb := cfg.tracker.wandb) is not None:
            makers.append(("wandb", lambda: WandbTracker(wandb, run)))
        if (mlflow := cfg.tracker.mlflow) is not None:
            makers.append(("mlflow", lambda: MlflowTracker(mlflow, run)))
        self._workers = [TrackerThread(name, make) for name, make in makers]

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Hand the named figures of a step to every tracker, and return at once."""
        for worker in self._workers:
            worker.log(_Sample(figures, step, unix_time))

    def close(self, *, succeeded: bool) -> None:
        """Deliver what is left, for half a minute at most. A second call does nothing."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for worker in self._workers:
            worker.stop(succeeded)
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        self._workers = []


class _Sample(NamedTuple):
    figures: Figures
    step: int
    unix_time: float


class _Stop(NamedTuple):
    succeeded: bool


class TrackerThread:
    """Feeds one tracker from a queue.

    Args:
        name: Of the tracker, for the warning.
        make: Opens the tracker. It is called on the thread, because it may talk to a server.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._make = make
        self._queue: queue.Queue[_Sample | _Stop] = queue.Queue(_QUEUE_RECORDS)
        self._tracker: Tracker | None = None
        self._warned = False
        self._failed_at = -_RETRY_SECONDS
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, sample: _Sample) -> None:
        """Queue a sample, or drop it where the tracker is too far behind."""
        try:
            self._queue.put_nowait(sample)
        except queue.Full:
            self._warn(f"it is {_QUEUE_RECORDS} records behind")

    def stop(self, succeeded: bool) -> None:
        """Ask the thread to end after what is queued."""
        try:
            self._queue.put_nowait(_Stop(succeeded))
        except queue.Full:
            self._warn("it did not keep up until the end of the run")

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread. One that does not end is left behind."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn("it did not finish; the run ends without it")

    def _run(self) -> None:
        while isinstance(item := self._queue.get(), _Sample):
            if time.monotonic() - self._failed_at >= _RETRY_SECONDS:
                self._attempt(functools.partial(self._log, item))
        if self._tracker is not None:
            self._attempt(functools.partial(self._tracker.close, succeeded=item.succeeded))

    def _log(self, sample: _Sample) -> None:
        self._opened().log(*sample)

    def _opened(self) -> Tracker:
        if self._tracker is None:
            self._tracker = self._make()
        return self._tracker

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker or its network raises, training goes on
            self._failed_at = time.monotonic()
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning(
                "tracker %s: %s. Training goes on; metrics.jsonl has what is missing there. Later failures of this "
                "tracker are not reported",
                self.name,
                reason,
            )
        self._warned = True
