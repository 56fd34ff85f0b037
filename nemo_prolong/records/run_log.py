"""Records of ``metrics.jsonl`` and ``events.jsonl``, reading them while they grow, and what follows from both.

One line is one record. Steps and validations share ``metrics.jsonl``. The page docs/metrics.md defines every key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from nemo_prolong.files import append_line, write_text_atomically

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number that may be NaN. JSON has no NaN, so the log has null in its place."""


@dataclass(frozen=True)
class GroupLoss:
    """Token losses of a group of tokens, as their sum in nats and how many target tokens they are of."""

    loss_sum: Measured
    target_tokens: int

    @property
    def mean(self) -> float:
        """Nats per target token, or NaN where there is none."""
        return self.loss_sum / self.target_tokens if self.target_tokens else math.nan

    def __add__(self, other: GroupLoss) -> GroupLoss:
        return GroupLoss(self.loss_sum + other.loss_sum, self.target_tokens + other.target_tokens)


Groups = dict[str, GroupLoss]
"""Losses by the name of their group, which is a bucket of positions or a domain."""


class _Record(BaseModel):
    """A line of a log. Keys of later versions are ignored. Fields with a default are those that some version lacks."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    def as_json(self) -> dict[str, Any]:
        """Return what is written: every field that has a value, in the order of the class, and null for NaN."""
        written: dict[str, Any] = _null_for_nan(self.model_dump(exclude_none=True))
        return written

    def append_to(self, path: Path) -> None:
        """Append the record as one line.

        Raises:
            OSError: If it cannot be written. No part of the line stays.
        """
        append_line(path, json.dumps(self.as_json(), allow_nan=False))


def _null_for_nan(value: Any) -> Any:
    """Return plain values with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StepRecord(_Record):
    """One optimizer step, over all ranks. ``loss`` is NaN where it was, and where no token of the step has one.

    Tokens are real ones without padding, but ``row_tokens``. ``time`` is Unix time at the end of the step.
    """

    step: int
    loss: Measured
    grad_norm: float | None = None
    learning_rate: float | None = None
    target_tokens: int | None = None
    real_tokens: int
    row_tokens: int | None = None
    consumed_train_tokens: int
    step_seconds: float
    tokens_per_second: float | None = None
    tokens_per_second_per_rank: float | None = None
    row_tokens_per_second: float | None = None
    model_flops: int | None = None
    model_flops_per_second: int | None = None
    model_flops_per_second_per_rank: int | None = None
    mfu: float | None = None
    fp8_peak_share: float | None = None
    data_wait_seconds: float | None = None
    checkpoint_seconds: float | None = None
    memory_bytes: int | None = None
    skipped_steps: int = 0
    goodput: float | None = None
    loss_by_position: Groups = {}
    loss_by_domain: Groups = {}
    time: float | None = None

    @property
    def real_tokens_per_second(self) -> float:
        """As recorded, but not rounded. It is NaN for a step without duration."""
        return self.real_tokens / self.step_seconds if self.step_seconds > 0 else math.nan


class ValidationRecord(_Record):
    """One validation, with its mean loss in nats per target token and after how many steps it was."""

    step: int
    val_loss: Measured
    val_target_tokens: int | None = None
    val_loss_by_position: Groups = {}
    val_loss_by_domain: Groups = {}
    time: float | None = None


class EventRecord(_Record):
    """What happened that is not a step. ``time`` is in Unix seconds, ``step`` counts optimizer steps done by then."""

    time: float
    step: int
    event: str
    detail: str


MetricsRecord = StepRecord | ValidationRecord


def parse_metrics(record: dict[str, Any]) -> MetricsRecord:
    """Return a line of ``metrics.jsonl``.

    Raises:
        ValidationError: If it is neither a step nor a validation.
    """
    kind: type[MetricsRecord] = ValidationRecord if "val_loss" in record else StepRecord
    return kind.model_validate(record)


R = TypeVar("R", bound=_Record)


class GrowingLog(Generic[R]):
    """The records of a file that another process appends to.

    Args:
        path: The file.
        parse: Makes a record of a JSON object. A ``ValidationError`` says that it is none.

    Attributes:
        records: Those read so far, in the order of the file.
        unreadable: Lines that are no record. A run that is killed may leave one.
    """

    def __init__(self, path: Path, parse: Callable[[dict[str, Any]], R]) -> None:
        self.path = path
        self.records: list[R] = []
        self.unreadable = 0
        self._parse = parse
        self._offset = 0
        self._inode = -1

    def refresh(self, *, ended: bool = False) -> None:
        """Read the lines that are new, or all of them where the file was replaced, as a resumed run does.

        A file that does not exist holds nothing.

        Args:
            ended: Nobody writes any more, so a last line without its end is a line. Otherwise it is left for next time.
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
        complete = lines if ended else lines[: lines.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in filter(bytes.strip, complete.splitlines()):
            self._add(line)

    def _start_over(self, inode: int) -> None:
        self.records, self.unreadable, self._offset, self._inode = [], 0, 0, inode

    def _add(self, line: bytes) -> None:
        try:
            self.records.append(self._parse(json.loads(line)))
        # A number as a line is JSON, and has no keys to look for.
        except (ValueError, TypeError, ValidationError):
            self.unreadable += 1


def metrics_log(run_dir: Path) -> GrowingLog[MetricsRecord]:
    """Return the metrics of a run, of which nothing is read yet."""
    return GrowingLog(run_dir / METRICS_FILE, parse_metrics)


def events_log(run_dir: Path) -> GrowingLog[EventRecord]:
    """Return the events of a run, of which nothing is read yet."""
    return GrowingLog(run_dir / EVENTS_FILE, EventRecord.model_validate)


def forget_steps_after(path: Path, step: int) -> None:
    """Drop the records of steps that are about to be trained again, so that the series has every step once.

    A line that a kill cut off is dropped too.

    Args:
        path: ``metrics.jsonl``, which may not exist.
        step: Optimizer steps of the checkpoint that the run goes on from.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError):
            continue
    write_text_atomically(path, "".join(kept))


class Goodput(NamedTuple):
    """How much of a run's time trained the model that came out.

    Attributes:
        useful_seconds: Time of the optimizer steps that count, each once. A step that was trained again after a
            restart counts by its last time. A step that was skipped does not count.
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


def goodput(metrics: Iterable[MetricsRecord], events: Iterable[EventRecord]) -> Goodput | None:
    """Return the goodput of a run so far, or None where nothing was recorded.

    Args:
        metrics: Records of ``metrics.jsonl``.
        events: Records of ``events.jsonl``. The first one is the start of the run.
    """
    useful: dict[int, float] = {}
    times = [event.time for event in events]
    skipped_steps = 0
    for record in metrics:
        seconds = 0.0
        if isinstance(record, StepRecord):
            is_skipped = record.skipped_steps > skipped_steps
            skipped_steps, seconds = record.skipped_steps, record.step_seconds
            useful[record.step] = 0.0 if is_skipped else seconds
        if record.time is not None:
            times += [record.time - seconds, record.time]
    return Goodput(sum(useful.values()), min(times), max(times)) if times else None
