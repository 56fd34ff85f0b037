"""What trackers are told of a record."""

from __future__ import annotations

import math

from nemo_prolong.records.run_log import GroupLoss, StepRecord
from nemo_prolong.telemetry.names import named_figures


def test_a_step_without_a_loss_tells_trackers_the_rest() -> None:
    groups = {"code": GroupLoss(0.0, 0), "chat": GroupLoss(math.nan, 3), "docs": GroupLoss(9.0, 2)}
    record = StepRecord(
        step=3,
        loss=math.nan,
        grad_norm=math.inf,
        target_tokens=0,
        real_tokens=64,
        consumed_train_tokens=64,
        step_seconds=1.0,
        loss_by_domain=groups,
    )
    figures = named_figures(record.as_json())
    assert figures["train/target_tokens"] == 0.0 and figures["train/real_tokens"] == 64.0
    assert not {"train/loss", "train/grad_norm"} & figures.keys()
    by_domain = {name: value for name, value in figures.items() if "domain" in name}
    assert by_domain == {"train/loss_by_domain/docs": 4.5}
    assert all(math.isfinite(value) for value in figures.values())
