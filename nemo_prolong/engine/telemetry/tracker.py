"""What a tracker is, and what it is told about the run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.files import write_json_atomically
from nemo_prolong.redaction import redact_values

_IDS_FILE = "trackers.json"

Figures = Mapping[str, float]
"""Name of a metric: its value."""


class Tracker(Protocol):
    """Takes named figures; every method may raise whatever it wants."""

    def log(self, figures: Figures, step: int, unix_time: float) -> None:
        """Record the figures of a step."""

    def close(self, *, succeeded: bool) -> None:
        """Deliver everything and say how the run ended."""


@dataclass(frozen=True)
class RunRecord:
    """What trackers are told about a run.

    Attributes:
        run_dir: Run directory.
        name: Name of the run.
        stage: Stage.
        step: Steps done before the first record.
        config: The configuration without secrets.
    """

    run_dir: Path
    name: str
    stage: str
    step: int
    config: dict[str, Any]

    @classmethod
    def of(cls, cfg: RunConfig, step: int) -> RunRecord:
        """Return the record of a stage that continues after ``step``."""
        config = redact_values(cfg.model_dump(mode="json"))
        return cls(Path(cfg.run_dir), cfg.name, str(cfg.stage), step, config)

    def id_of(self, tracker: str, make: Callable[[], str] = lambda: uuid.uuid4().hex) -> tuple[str, bool]:
        """Return the id of this run at a tracker, and whether it is new.

        A resumed run goes on under the id it has. One that starts at step 0 gets a new one: trackers do not take a
        step twice.

        Args:
            tracker: Name of the tracker.
            make: Makes a new id.
        """
        path = self.run_dir / _IDS_FILE
        try:
            ids = json.loads(path.read_text())
        except (OSError, ValueError):
            ids = {}
        if self.step > 0 and tracker in ids:
            return ids[tracker], False
        ids[tracker] = make()
        write_json_atomically(path, ids)
        return ids[tracker], True
