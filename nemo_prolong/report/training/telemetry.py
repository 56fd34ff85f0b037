"""What the steps and events of a stage add up to: losses by group, speed, waits, restarts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_prolong.records.run_log import GroupLoss, Groups, StepRecord
from nemo_prolong.report.training.read import StageRun

WINDOW_FRACTION = 0.05
WINDOW_STEPS = 20
"""A loss by group is the mean over so large a share of a stage's steps, and over as many steps at least."""


@dataclass(frozen=True)
class GroupChange:
    """A group of tokens over a stage: losses in nats per token at both ends (None where it has no token there)."""

    name: str
    first_loss: float | None
    last_loss: float | None
    target_tokens: int


def changes(steps: Sequence[StepRecord], key: str) -> list[GroupChange]:
    """Return every group of a stage with its mean loss over the first and the last steps.

    Args:
        steps: Of the stage.
        key: ``loss_by_position`` or ``loss_by_domain``.
    """
    window = max(WINDOW_STEPS, round(WINDOW_FRACTION * len(steps)))
    whole, first, last = (_added(part, key) for part in (steps, steps[:window], steps[-window:]))
    return [
        GroupChange(name, _mean(first.get(name)), _mean(last.get(name)), group.target_tokens)
        for name, group in whole.items()
    ]


def _added(steps: Iterable[StepRecord], key: str) -> Groups:
    sums: Groups = {}
    for step in steps:
        for name, group in getattr(step, key).items():
            sums[name] = sums.get(name, GroupLoss(0.0, 0)) + group
    return sums


def _mean(group: GroupLoss | None) -> float | None:
    return group.loss_sum / group.target_tokens if group is not None and group.target_tokens else None


def last_position(name: str) -> int:
    """Return the last position of a bucket from its name, ``0-2047``."""
    return int(name.split("-")[1])


def median_of(steps: Sequence[StepRecord], key: str) -> float | None:
    """Return the median of a figure over the steps that have it."""
    values = [value for step in steps if (value := getattr(step, key)) is not None]
    return statistics.median(values) if values else None


def share_of_step_time(steps: Sequence[StepRecord], key: str) -> float | None:
    """Return what a wait comes to in units of the time of all steps; None where it was not recorded."""
    waits = [value for step in steps if (value := getattr(step, key)) is not None]
    seconds = sum(step.step_seconds for step in steps)
    return sum(waits) / seconds if waits and seconds > 0 else None


def fill(steps: Sequence[StepRecord]) -> float | None:
    """Return real tokens over row tokens."""
    pairs = [(step.real_tokens, step.row_tokens) for step in steps if step.row_tokens]
    return sum(real for real, _ in pairs) / sum(rows for _, rows in pairs) if pairs else None


def target_share(steps: Sequence[StepRecord]) -> float | None:
    """Return target tokens over row tokens; None where either was not recorded."""
    pairs = [(step.target_tokens, step.row_tokens) for step in steps if step.target_tokens is not None]
    rows = sum(row or 0 for _, row in pairs)
    return sum(targets for targets, _ in pairs) / rows if rows else None


def event_counts(stage: StageRun) -> dict[str, int]:
    """Return how often each kind of event happened."""
    return dict(Counter(event.event for event in stage.events))


def planned_ranks(stage: StageRun) -> int | None:
    """Return the ranks the stage was configured for; None where its ``config.json`` does not say."""
    layout = stage.config.get("parallelism", {})
    if "num_nodes" not in layout or "ranks_per_node" not in layout:
        return None
    return int(layout["num_nodes"]) * int(layout["ranks_per_node"])


def planned_tokens(stage: StageRun) -> int | None:
    """Return the row tokens of all steps of the stage; None where its ``config.json`` does not say."""
    rows = stage.config.get("train", {}).get("global_batch_size")
    return None if rows is None else int(rows) * stage.manifest.seq_length * stage.manifest.train_iters
