"""A run in the terminal while it trains: progress, loss, speed, memory, the last events."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import EventRecord, GroupLoss, MetricsRecord, StepRecord, ValidationRecord, goodput
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.report import numbers
from nemo_prolong.report.terminal.layout import facts, plain
from nemo_prolong.units import format_bytes, format_seconds, format_tokens

RECENT_STEPS = 20
"""Steps that rates and losses by group are averaged over."""

SHOWN_EVENTS = 6
_CURVE_COLUMNS = 56
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_SILENCE_STEPS = 10
"""A run that recorded nothing for as long as so many steps is said to be silent."""


class RunWatch:
    """What is on disk of a run, read again and again.

    Args:
        run_dir: Run directory.

    Raises:
        CheckpointError: If it is none.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        run = RunDirectory(run_dir)
        self._metrics, self._events = run.metrics(), run.events()
        self.refresh()

    def refresh(self) -> None:
        """Read what is new."""
        self.manifest = StageManifest.read(self.run_dir)
        self._metrics.refresh()
        self._events.refresh()

    @property
    def is_over(self) -> bool:
        """Whether training has ended and said so."""
        return self.manifest.status != "running"

    def frame(self, now: float | None = None) -> RenderableType:
        """Return one picture of the run.

        Args:
            now: Unix time; None is the present.
        """
        now = time.time() if now is None else now
        steps = [record for record in self._metrics.records if isinstance(record, StepRecord)]
        parts: list[RenderableType] = [self._progress(steps, now)]
        if steps:
            recent = steps[-RECENT_STEPS:]
            parts.append(_curve([record.loss for record in steps]))
            parts.append(
                Columns([_training(steps, recent, self._metrics.records), self._speed(recent)], padding=(0, 4))
            )
            groups = [_losses("position", recent, "loss_by_position"), _losses("domain", recent, "loss_by_domain")]
            parts.append(Columns([table for table in groups if table is not None], padding=(0, 4)))
        parts.append(_events(self._events.records))
        manifest = self.manifest
        title = (
            f"{manifest.name}: {manifest.stage}, {manifest.model.name}, rows of {format_tokens(manifest.seq_length)}"
        )
        return Panel(Group(*parts), title=plain(title), title_align="left")

    def _progress(self, steps: Sequence[StepRecord], now: float) -> RenderableType:
        done, total = (steps[-1].step if steps else 0), self.manifest.train_iters
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            f"step {done:,} of {total:,}",
            ProgressBar(total=total, completed=done, width=40),
            f"{done / total:.1%}",
            self._time_left(steps, total - done, now),
        )
        return grid

    def _time_left(self, steps: Sequence[StepRecord], left: int, now: float) -> str:
        if self.is_over:
            return self.manifest.status
        if not steps:
            return "no step yet"
        seconds = statistics.median(record.step_seconds for record in steps[-RECENT_STEPS:])
        silent = now - max([steps[-1].time or 0.0, *(event.time for event in self._events.records[-1:])])
        if silent > max(60.0, _SILENCE_STEPS * seconds):
            return f"nothing recorded for {format_seconds(silent)}"
        return f"ETA {format_seconds(left * seconds)}"

    def _speed(self, recent: Sequence[StepRecord]) -> Table:
        last = recent[-1]
        seconds = sum(record.step_seconds for record in recent)
        rate = sum(record.real_tokens for record in recent) / seconds
        rows = {
            "tokens/s": f"{rate:,.0f}",
            "tokens/s and rank": f"{rate / self.manifest.world_size:,.0f}",
            "seconds a step": f"{seconds / len(recent):.3g}",
            "MFU (BF16 peak)": numbers.percent(_mean(recent, "mfu")),
            "model TFLOP/s and rank": _tera(_mean(recent, "model_flops_per_second_per_rank")),
            "waiting for rows": _share(recent, "data_wait_seconds", seconds),
            "waiting for checkpoints": _share(recent, "checkpoint_seconds", seconds),
            "goodput": numbers.percent(self._goodput()),
            "memory": format_bytes(last.memory_bytes) if last.memory_bytes else numbers.MISSING,
        }
        return facts(rows)

    def _goodput(self) -> float | None:
        found = goodput(self._metrics.records, self._events.records)
        return found.fraction if found else None


def _training(steps: Sequence[StepRecord], recent: Sequence[StepRecord], records: Sequence[MetricsRecord]) -> Table:
    last = steps[-1]
    validations = [record.val_loss for record in records if isinstance(record, ValidationRecord)]
    rows = {
        "loss": f"{numbers.loss(last.loss)}  (mean of {len(recent)}: {numbers.loss(_mean(recent, 'loss'))})",
        "validation loss": numbers.loss(validations[-1] if validations else None),
        "grad norm": _formatted(last.grad_norm, ".3f"),
        "learning rate": _formatted(last.learning_rate, ".2e"),
        "tokens so far": numbers.tokens(last.consumed_train_tokens),
        "filled": numbers.percent(_fill(recent)),
        "targets": numbers.percent(_target_share(recent)),
        "skipped steps": f"{last.skipped_steps:,}",
    }
    return facts(rows)


def _losses(title: str, recent: Sequence[StepRecord], key: str) -> Table | None:
    """Return the mean loss of every group over the recent steps; None where they have no groups."""
    sums: dict[str, GroupLoss] = {}
    for record in recent:
        for name, group in getattr(record, key).items():
            sums[name] = sums.get(name, GroupLoss(0.0, 0)) + group
    if not sums:
        return None
    result = Table(f"loss by {title}", "", "tokens", box=None, pad_edge=False, header_style="dim")
    for name, group in sums.items():
        result.add_row(plain(name), numbers.loss(group.mean), numbers.tokens(group.target_tokens))
    return result


def _events(events: Sequence[EventRecord]) -> Table:
    result = Table("last events", "step", "", "", box=None, pad_edge=False, header_style="dim")
    for event in events[-SHOWN_EVENTS:]:
        clock = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
        result.add_row(clock, f"{event.step:,}", plain(event.event), plain(event.detail))
    if not events:
        result.add_row(numbers.MISSING, "", "", "")
    return result


def _curve(losses: Sequence[float]) -> Text:
    """Return the losses so far as one line of blocks, each the mean of a stretch of steps."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < 2:
        return Text("")
    width = min(_CURVE_COLUMNS, len(finite))
    edges = [len(finite) * column // width for column in range(width + 1)]
    means = [statistics.fmean(finite[begin:end]) for begin, end in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    curve = "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
    return Text.assemble(("loss ", "dim"), f"{means[0]:.3f} ", (curve, "cyan"), f" {means[-1]:.3f}")


def _values(records: Iterable[StepRecord], key: str) -> list[float]:
    """Return a figure of every record that has it. A step without a target token has no loss."""
    values = [value for record in records if (value := getattr(record, key)) is not None]
    return [value for value in values if math.isfinite(value)]


def _mean(records: Iterable[StepRecord], key: str) -> float | None:
    values = _values(records, key)
    return statistics.fmean(values) if values else None


def _fill(records: Iterable[StepRecord]) -> float | None:
    pairs = [(record.real_tokens, record.row_tokens) for record in records if record.row_tokens]
    return sum(real for real, _ in pairs) / sum(row for _, row in pairs) if pairs else None


def _target_share(records: Iterable[StepRecord]) -> float | None:
    pairs = [(record.target_tokens or 0, record.row_tokens) for record in records if record.row_tokens]
    return sum(targets for targets, _ in pairs) / sum(row for _, row in pairs) if pairs else None


def _share(records: Sequence[StepRecord], key: str, seconds: float) -> str:
    waits = _values(records, key)
    return f"{sum(waits) / seconds:.1%} of step time" if waits else numbers.MISSING


def _formatted(value: float | None, number_format: str) -> str:
    return numbers.MISSING if value is None else format(value, number_format)


def _tera(value: float | None) -> str:
    return numbers.MISSING if value is None else numbers.significant(value / 1e12)
