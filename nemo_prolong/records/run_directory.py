"""The directory of a run, where everything of it lies, and the records in it.

The start of a stage makes one ``RunDirectory`` and hands it down, so that no path is built twice and no manifest read
twice on the way to the first step.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_prolong.config.commands import shell_word
from nemo_prolong.files import write_json_atomically, write_text_atomically
from nemo_prolong.records.checkpoint.manifest import RunIdentity
from nemo_prolong.records.run_log import (
    EVENTS_FILE,
    METRICS_FILE,
    EventRecord,
    Goodput,
    GrowingLog,
    MetricsRecord,
    events_log,
    forget_steps_after,
    goodput,
    metrics_log,
)
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, StageManifest
from nemo_prolong.redaction import redact

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
OVERRIDES_FILE = "overrides.txt"


class RunDirectory:
    """The directory of one run. It need not exist. The first write makes it.

    Args:
        path: ``runs/<name>``.

    Attributes:
        path: The directory.
        metrics_file: One line a step or validation.
        events_file: What happened that is not a step.
        overrides_file: What was typed.
        tensorboard: Where TensorBoard's events go.
        tracker_ids: The ids of the run at its trackers, a file each.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_file = self.path / METRICS_FILE
        self.events_file = self.path / EVENTS_FILE
        self.overrides_file = self.path / OVERRIDES_FILE
        self.tensorboard = self.path / "tensorboard"
        self.tracker_ids = self.path / "tracker_ids"
        self._config_file = self.path / CONFIG_FILE

    def log_file(self, rank: int) -> Path:
        """Return where a rank's library output goes."""
        return self.path / ("train.log" if rank == 0 else f"train.rank{rank}.log")

    def stacks_file(self, rank: int) -> Path:
        """Return where a rank that hangs writes its stacks."""
        return self.path / f"stacks.rank{rank}.txt"

    @property
    def hang_file(self) -> Path:
        """What the first rank that hangs leaves, so that the others do not record the hang again."""
        return self.path / "hang.txt"

    # ---- the stage and its configuration ----------------------------------------------------------------------------

    @property
    def has_manifest(self) -> bool:
        """Whether there is a ``stage.json``."""
        return (self.path / MANIFEST_FILE).is_file()

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here, so that its manifest and its configuration are written."""
        return self.has_manifest and self._config_file.is_file()

    @cached_property
    def manifest(self) -> StageManifest:
        """``stage.json``, read once or as it was written here last.

        Raises:
            CheckpointError: If there is none or it is not ours.
        """
        return StageManifest.read(self.path)

    @property
    def identity(self) -> RunIdentity | None:
        """The run as its checkpoints name it, or None where there is no readable manifest."""
        if "manifest" not in vars(self):
            return RunIdentity.of(self.path)
        return RunIdentity(name=self.manifest.name, started_at=self.manifest.started_at)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, the configuration that the run was started with, in plain JSON types."""
        config: dict[str, Any] = json.loads(self._config_file.read_text())
        return config

    def write_manifest(self, manifest: StageManifest) -> None:
        """Write ``stage.json``. A reader never sees half of it."""
        manifest.write(self.path)
        self.manifest = manifest

    def write_start(self, manifest: StageManifest, overrides: Sequence[str], config: dict[str, Any]) -> None:
        """Write what says that a run begins or resumes here, and drop the records of steps that are trained again.

        Args:
            manifest: Of the stage as it starts.
            overrides: What was typed. The file has one a line, as bash reads it.
            config: The configuration in plain JSON types, without secrets.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        forget_steps_after(self.metrics_file, manifest.step)
        # The order matters. A manifest without a configuration is known to be a run that has not begun.
        self.write_manifest(manifest)
        write_text_atomically(
            self.overrides_file, redact("".join(f"{shell_word(override)}\n" for override in overrides))
        )
        write_json_atomically(self._config_file, config)
        self.config = config

    # ---- what happens while it trains -------------------------------------------------------------------------------

    def record_event(self, step: int, event: str, detail: str) -> None:
        """Append to ``events.jsonl``, on one rank only.

        An event that cannot be written is logged, so that a full disk does not end the run.

        Args:
            step: Optimizer steps done.
            event: Kind, such as ``checkpoint_failed``.
            detail: What happened, one sentence.
        """
        record = EventRecord(time=round(time.time(), 3), step=step, event=event, detail=redact(detail))
        try:
            record.append_to(self.events_file)
        except OSError as error:
            log.error("event %s could not be recorded: %s", record.as_json(), error)

    def append_metrics(self, record: MetricsRecord) -> None:
        """Append to ``metrics.jsonl``.

        Raises:
            OSError: If it cannot be written.
        """
        record.append_to(self.metrics_file)

    def metrics(self) -> GrowingLog[MetricsRecord]:
        """Return the metrics so far. Its ``refresh`` reads on."""
        return _read(metrics_log(self.path))

    def events(self) -> GrowingLog[EventRecord]:
        """Return the events so far. Its ``refresh`` reads on."""
        return _read(events_log(self.path))

    def goodput(self) -> Goodput | None:
        """Return the goodput so far, or None where nothing was recorded."""
        return goodput(self.metrics().records, self.events().records)


def _read(growing: GrowingLog[Any]) -> GrowingLog[Any]:
    growing.refresh()
    return growing
