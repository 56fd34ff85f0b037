"""One record of ``metrics.jsonl`` as numbers with the names that every tracker gets (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STEP_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "target_tokens": "train/target_tokens",
    "real_tokens": "train/real_tokens",
    "row_tokens": "train/row_tokens",
    "consumed_train_tokens": "train/consumed_train_tokens",
    "skipped_steps": "train/skipped_steps",
    "step_seconds": "perf/step_seconds",
    "tokens_per_second": "perf/tokens_per_second",
    "row_tokens_per_second": "perf/row_tokens_per_second",
    "tokens_per_second_per_rank": "perf/tokens_per_second_per_rank",
    "model_flops": "perf/model_flops",
    "model_flops_per_second": "perf/model_flops_per_second",
    "model_flops_per_second_per_rank": "perf/model_flops_per_second_per_rank",
    "mfu": "perf/mfu",
    "fp8_peak_share": "perf/fp8_peak_share",
    "data_wait_seconds": "perf/data_wait_seconds",
    "checkpoint_seconds": "perf/checkpoint_seconds",
    "memory_bytes": "perf/memory_bytes",
    "goodput": "perf/goodput",
    "val_loss": "val/loss",
    "val_target_tokens": "val/target_tokens",
}
"""The name of a metric by its key in a record."""

GROUP_NAMES = {
    "loss_by_position": "train/loss_by_position",
    "loss_by_domain": "train/loss_by_domain",
    "val_loss_by_position": "val/loss_by_position",
    "val_loss_by_domain": "val/loss_by_domain",
}
"""What stands before the name of a group, by the key of the record that holds the groups."""


def named_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a record. A loss or mean that has no target token, or is no number, is left out.

    >>> named_figures({"step": 3, "loss": 4.5, "loss_by_domain": {"code": {"loss_sum": 9.0, "target_tokens": 2}}})
    {'train/loss': 4.5, 'train/loss_by_domain/code': 4.5}
    """
    figures = {name: float(record[key]) for key, name in STEP_NAMES.items() if record.get(key) is not None}
    for key, name in GROUP_NAMES.items():
        for group, sums in record.get(key, {}).items():
            if sums["target_tokens"] and sums["loss_sum"] is not None:
                figures[f"{name}/{group}"] = sums["loss_sum"] / sums["target_tokens"]
    return figures
