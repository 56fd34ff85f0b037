"""What a tracker is, and what it is told about the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.redaction import redact_values

Figures = Mapping[str, float]
"""The value of each metric by its name."""


class Tracker(Protocol):
    """Takes named figures. Every method may raise whatever it wants."""

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Record the figures of a step."""

    def close(self, *, succeeded: bool) -> None:
        """Deliver everything and say how the run ended."""


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told about a run.

    Attributes:
        directory: Run directory.
        name: Name of the run.
        stage: Stage.
        step: Steps done before the first record.
        config: The configuration without secrets.
    """

    directory: RunDirectory
    name: str
    stage: str
    step: int
    config: dict[str, Any]

    @classmethod
    def of(cls, cfg: RunConfig, directory: RunDirectory, step: int) -> TrackedRun:
        """Return what is said of a stage that continues after ``step``."""
        return cls(directory, cfg.name, str(cfg.stage), step, redact_values(cfg.model_dump(mode="json")))

    def forget_ids(self) -> None:
        """Have every tracker begin a new series, since none takes a step twice."""
        shutil.rmtree(self.directory.tracker_ids, ignore_errors=True)

    def id_of(self, tracker: str, make: Callable[[], str]) -> tuple[str, bool]:
        """Return the id of this run at a tracker, and whether it is new. A resumed run keeps the one it has.

        Args:
            tracker: Name of the tracker.
            make: Makes a new id.
        """
        # There is a file for each tracker, since each is written by a thread of its own.
        path = self.directory.tracker_ids / tracker
        if path.exists():
            return path.read_text().strip(), False
        made = make()
        write_text_atomically(path, f"{made}\n")
        return made, True
