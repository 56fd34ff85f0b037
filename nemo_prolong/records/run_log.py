"""``metrics.jsonl`` and ``events.jsonl`` of a run: reading them while they grow, and what follows from both.

For the rooms that write them and the rooms that read them. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_prolong.files import append_line
from nemo_prolong.redaction import redact

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

Record = Mapping[str, Any]


class GrowingRecords:
    """The records of a file of JSON objects that another process appends to.

    Attributes:
        records: Those read so far, in the order of the file.
        unreadable: Lines that are no JSON object; a run that is killed may leave one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.unreadable = 0
        self._offset = 0
        self._inode = -1

    def refresh(self) -> None:
        """Read the lines that are new; all of them where the file was replaced, as a resumed run does.

        A last line without its end is left for the next time. A file that does not exist holds nothing.
        """
        try:
            file = self.path.open("rb")
        except OSError:
            self._start_over(-1)
            return
        with file:
            status = self.path.stat()
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._start_over(status.st_ino)
            file.seek(self._offset)
            lines = file.read()
        complete = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in filter(bytes.strip, complete.splitlines()):
            self._add(line)

    def _start_over(self, inode: int) -> None:
        self.records, self.unreadable, self._offset, self._inode = [], 0, 0, inode

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            self.records.append(record)
        else:
            self.unreadable += 1


class Goodput(NamedTuple):
    """How much of a run's time trained the model that came out.

    Attributes:
        useful_seconds: Time of the optimizer steps that count, each once: of a step that was trained again after a
            restart, the last time; of a step that was skipped, none.
        began: Unix time of the first start of the run.
        ended: Unix time of its last record.
    """

    useful_seconds: float
    began: float
    ended: float

    @property
    def wall_seconds(self) -> float:
        """From the first start to the last record, over all restarts and the time between them."""
        return self.ended - self.began

    @property
    def fraction(self) -> float:
        """Useful time over wall time."""
        return self.useful_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


def goodput(metrics: Iterable[Record], events: Iterable[Record]) -> Goodput | None:
    """Return the goodput of a run so far; None where nothing was recorded.

    Args:
        metrics: Records of ``metrics.jsonl``.
        events: Records of ``events.jsonl``; the first one is the start of the run.
    """
    useful: dict[int, float] = {}
    times = [record["time"] for record in events]
    skipped_steps = 0
    for record in metrics:
        if "step_seconds" in record:
            is_skipped = record.get("skipped_steps", 0) > skipped_steps
            skipped_steps = record.get("skipped_steps", 0)
            useful[record["step"]] = 0.0 if is_skipped else record["step_seconds"]
        times += [record["time"] - record.get("step_seconds", 0.0), record["time"]]
    return Goodput(sum(useful.values()), min(times), max(times)) if times else None


def record_event(run_dir: Path, step: int, event: str, detail: str) -> None:
    """Append one event; call on one rank only.

    A record that cannot be written is logged: a full disk is the event most worth surviving.

    Args:
        run_dir: Run directory.
        step: Optimizer steps done.
        event: Kind, such as ``checkpoint_failed``.
        detail: What happened, one sentence.
    """
    record = {"time": round(time.time(), 3), "step": step, "event": event, "detail": redact(detail)}
    try:
        append_line(run_dir / EVENTS_FILE, json.dumps(record))
    except OSError as error:
        log.error("event %s could not be recorded: %s", record, error)
