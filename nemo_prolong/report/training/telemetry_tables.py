"""The tables of a report about what happened while a stage trained."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from nemo_prolong.report import numbers
from nemo_prolong.report.tables import Cell, Table, text_cells
from nemo_prolong.report.training.read import StageRun
from nemo_prolong.report.training.summary import finite, median_tokens_per_second
from nemo_prolong.report.training.telemetry import (
    WINDOW_FRACTION,
    WINDOW_STEPS,
    GroupChange,
    changes,
    event_counts,
    fill,
    last_position,
    median_of,
    planned_ranks,
    planned_tokens,
    share_of_step_time,
    target_share,
)
from nemo_prolong.units import format_seconds

SHOWN_EVENTS = 40
"""Events of a stage that a report lists; of more, the last ones."""

WINDOW_WORDS = (
    f"Means over the first and last {WINDOW_STEPS} steps of a stage, or {WINDOW_FRACTION:.0%} of them. "
    "Nats per target token."
)
_ROUTINE = frozenset({"checkpoint_saved"})
"""Events that are counted and not listed: they are as many as checkpoints."""


def domain_table(stages: Sequence[StageRun]) -> Table | None:
    """Return the loss of every domain at both ends of every stage; None where no stage recorded it."""
    rows = []
    for stage in stages:
        found = sorted(changes(stage.steps, "loss_by_domain"), key=lambda change: -change.target_tokens)
        total = sum(change.target_tokens for change in found)
        for number, change in enumerate(found):
            cells = text_cells(
                change.name, numbers.percent(change.target_tokens / total if total else None), *_losses(change)
            )
            rows.append([Cell(stage.label, repeats=number > 0), *cells])
    head = ["Stage", "Domain", "Share of target tokens", "Loss at the start", "Loss at the end"]
    return Table(head, rows, frozenset({0, 1})) if rows else None


def position_table(stages: Sequence[StageRun]) -> Table | None:
    """Return the loss of every bucket of positions at both ends of every stage; None where none recorded it."""
    rows = []
    for stage in stages:
        found = [change for change in changes(stage.steps, "loss_by_position") if change.target_tokens]
        for number, change in enumerate(sorted(found, key=lambda change: last_position(change.name))):
            first = int(change.name.split("-")[0])
            cells = text_cells(numbers.span(first, last_position(change.name) + 1), *_losses(change))
            rows.append([Cell(stage.label, repeats=number > 0), *cells])
    head = ["Stage", "Positions", "Loss at the start", "Loss at the end"]
    return Table(head, rows, frozenset({0, 1})) if rows else None


def _losses(change: GroupChange) -> tuple[str, str]:
    return numbers.loss(change.first_loss), numbers.loss(change.last_loss)


def performance_table(stages: Sequence[StageRun]) -> Table | None:
    """Return speed, waits and goodput of every stage against what it was configured for; None without a step."""
    trained = [stage for stage in stages if stage.steps]
    if not trained:
        return None
    columns = [_performance(stage) for stage in trained]
    rows = [text_cells(title, *(column[title] for column in columns)) for title in columns[0]]
    shown = [row for row in rows if any(cell.text != numbers.MISSING for cell in row[1:])]
    return Table(["", *(stage.label for stage in trained)], shown)


def _performance(stage: StageRun) -> dict[str, str]:
    steps, ranks = stage.steps, stage.manifest.world_size
    rate = median_tokens_per_second(stage)
    flops = median_of(steps, "model_flops_per_second_per_rank")
    counts = event_counts(stage)
    return {
        "ranks, of planned": _of(ranks, planned_ranks(stage)),
        "real tokens, of planned row tokens": _share_of(stage.tokens_trained, planned_tokens(stage)),
        "real tokens in a row": numbers.percent(fill(steps)),
        "target tokens in a row": numbers.percent(target_share(steps)),
        "tokens/s and rank": numbers.MISSING if rate is None else numbers.count(rate / ranks),
        "model TFLOP/s and rank": numbers.MISSING if flops is None else numbers.significant(flops / 1e12),
        "MFU (BF16 peak)": numbers.percent(median_of(steps, "mfu")),
        "share of the FP8 peak": numbers.percent(median_of(steps, "fp8_peak_share")),
        "waiting for rows, of step time": numbers.percent(share_of_step_time(steps, "data_wait_seconds")),
        "waiting for checkpoints, of step time": numbers.percent(share_of_step_time(steps, "checkpoint_seconds")),
        "goodput": numbers.percent(stage.goodput.fraction if stage.goodput else None),
        "first start to last record": format_seconds(stage.goodput.wall_seconds) if stage.goodput else numbers.MISSING,
        "restarts": numbers.count(counts.get("resumed", 0)),
        "skipped steps": numbers.count(steps[-1].skipped_steps),
        "checkpoints saved": numbers.count(counts.get("checkpoint_saved", 0)),
        "checkpoints failed or refused": numbers.count(
            counts.get("checkpoint_failed", 0) + counts.get("checkpoint_refused", 0)
        ),
    }


def _of(value: int, planned: int | None) -> str:
    return f"{value:,}" if planned is None else f"{value:,} of {planned:,}"


def _share_of(tokens: int, planned: int | None) -> str:
    if planned is None:
        return numbers.tokens(tokens)
    return f"{numbers.tokens(tokens)} of {numbers.tokens(planned)} ({numbers.percent(finite(tokens / planned))})"


def events_table(stages: Sequence[StageRun]) -> Table | None:
    """Return what happened, in its order; None where nothing but saves did."""
    rows = []
    for stage in stages:
        listed = [event for event in stage.events if event.event not in _ROUTINE]
        for number, event in enumerate(listed[-SHOWN_EVENTS:]):
            clock = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
            cells = text_cells(clock, f"{event.step:,}", event.event.replace("_", " "), event.detail)
            rows.append([Cell(stage.label, repeats=number > 0), *cells])
    head = ["Stage", "Time, UTC", "Step", "Event", "Detail"]
    return Table(head, rows, frozenset({0, 1, 3, 4})) if rows else None
