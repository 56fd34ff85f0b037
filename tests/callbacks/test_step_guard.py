"""Steps whose rows have no target token are no steps, and not many of them pass for training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.config.schema import FaultsConfig
from nemo_prolong.errors import DataError
from nemo_prolong.records.run_directory import RunDirectory

ROWS = [f"data/chat row {number}" for number in (7, 3, 11, 2, 9, 5)]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Guarded:
    """A guard and the loop that asks it."""

    def __init__(self, directory: Path, train_iters: int = 100, **faults: Any) -> None:
        self.directory = directory
        self.loop: Any = SimpleNamespace(step=0, rank=0, train_iters=train_iters)
        self.guard = StepGuard(FaultsConfig(**faults), RunDirectory(directory), lambda step: ROWS)

    def step(self, targets: int, loss_sum: float = 10.0, grad_norm: float = 1.0) -> bool:
        """Return whether a step of two micro-batches is allowed; the second has all of the targets."""
        self.guard.on_step_start(self.loop)
        for part in ([0.0, 0.0], [loss_sum if targets else 0.0, targets]):
            output = {"loss_sum_and_ub_size": torch.tensor(part, dtype=torch.float64)}
            self.guard.on_losses(self.loop, [output])
        allowed = self.guard.allows_step(self.loop, grad_norm if targets else 0.0)
        self.loop.step += 1
        return allowed

    def events(self) -> list[tuple[int, str, str]]:
        lines = (self.directory / "events.jsonl").read_text().splitlines()
        return [(event["step"], event["event"], event["detail"]) for event in map(json.loads, lines)]


def test_a_step_without_targets_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded = Guarded(tmp_path)
    assert [guarded.step(targets) for targets in (5, 0, 5)] == [True, False, True]
    assert guarded.guard.skipped_steps == 1
    rows = "data/chat row 7, data/chat row 3, data/chat row 11, data/chat row 2 and 2 more"
    assert guarded.events() == [(2, "no_targets", rows)]
    assert f"step 2 is skipped on all ranks: no token of its rows is a target ({rows})" in caplog.text


def test_a_step_without_targets_leaves_the_window_of_spikes_alone(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, spike_window_steps=4)
    for targets in (5, 5, 0, 0, 5, 5):
        guarded.step(targets)
    assert list(guarded.guard.detector.taken) == [(2.0, 1.0)] * 4


def test_too_many_steps_without_targets_in_a_row_stop_the_stage(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, max_steps_without_targets=3)
    assert [guarded.step(targets) for targets in (0, 0, 5, 0, 0)] == [False, False, True, False, False]
    rule = (
        r"^step 6: 3 steps in a row had no target token, so there was nothing to learn; the rows of the last one: "
        r"data/chat row 7, .* and 2 more\. Look at these rows with scripts/inspect_data\.py .*"
        r"raise faults\.max_steps_without_targets\.$"
    )
    with pytest.raises(DataError, match=rule):
        guarded.step(0)


def test_a_short_stage_of_nothing_else_does_not_end_well(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, train_iters=2)
    assert guarded.step(0) is False
    with pytest.raises(DataError, match="step 2: 2 steps in a row had no target token"):
        guarded.step(0)


def test_every_rank_stops_and_one_writes(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, train_iters=1)
    guarded.loop.rank = 1
    with pytest.raises(DataError):
        guarded.step(0)
    assert not (tmp_path / "events.jsonl").exists()


def test_steps_without_targets_are_counted_over_a_resume(tmp_path: Path) -> None:
    before, after = (Guarded(tmp_path, max_steps_without_targets=2) for _ in range(2))
    before.step(0)
    after.guard.load_state_dict(before.guard.state_dict())
    with pytest.raises(DataError, match="2 steps in a row"):
        after.step(0)


def test_a_checkpoint_of_before_they_were_counted_is_taken(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, max_steps_without_targets=2)
    guarded.guard.load_state_dict({"skipped_steps": 3, "in_a_row": 0, "taken": []})
    assert guarded.step(0) is False
    assert guarded.guard.skipped_steps == 4


def test_a_gradient_of_nan_without_targets_is_a_fault(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path)
    guarded.guard.on_step_start(guarded.loop)
    assert guarded.guard.allows_step(guarded.loop, math.nan) is False
    assert guarded.events() == [(1, "step_skipped", "grad norm is nan")]
