"""Which harmful steps the guard skips, when it gives up, and what a resumed run goes on with."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch

from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.config.schema import FaultsConfig
from nemo_prolong.errors import TrainingError
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fake_loop import FakeLoop

pytestmark = pytest.mark.usefixtures("one_rank")

WINDOW = 4


def new_guard(run: RunDirectory, **settings: Any) -> StepGuard:
    return StepGuard(FaultsConfig(spike_window_steps=WINDOW, **settings), run, lambda step: [])


def losses(total: float, targets: int) -> dict[str, torch.Tensor]:
    return {"loss_sum_and_ub_size": torch.tensor([total, targets], dtype=torch.float64)}


def take(guard: StepGuard, loop: FakeLoop, loss: float, grad_norm: float = 1.0) -> bool:
    """Train a step of two micro-batches, and return whether the optimizer may take it."""
    guard.on_step_start(loop)
    guard.on_losses(loop, [losses(loss * 30, 30), losses(loss * 10, 10)])
    allowed = guard.allows_step(loop, grad_norm)
    loop.step += 1
    return allowed


def events(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(event.step, event.event, event.detail) for event in run.events().records]


def test_the_loss_is_the_mean_over_all_target_tokens(run: RunDirectory) -> None:
    guard, loop = new_guard(run), FakeLoop()
    guard.on_step_start(loop)
    guard.on_losses(loop, [losses(30.0, 10), losses(10.0, 30)])
    assert guard.allows_step(loop, 2.5) is True
    assert list(guard.detector.taken) == [(1.0, 2.5)]


def test_skips_that_become_frequent_are_said_loudly(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    guard, loop = new_guard(run, spike_sigmas=None), FakeLoop()
    bad = {2, 60, 101, 102, 103, 150, 151, 152, 153}
    for step in range(1, 160):
        assert take(guard, loop, 1.0, math.nan if step in bad else 1.0) == (step not in bad)
    loud = [(step, detail) for step, event, detail in events(run) if event == "skips_frequent"]
    # Step 2 is out of the window at 102, so the fourth in it comes at 103.
    assert [step for step, _ in loud] == [103, 153]
    assert loud[1][1] == (
        "8 of the last 100 steps were skipped, 9 of the stage; the last one: grad norm is nan. Look at the rows of "
        "these steps. If they are sound, suspect the kernels of attention: cuDNN before 9.18 is known for NaN"
    )
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        detail for _, detail in loud
    ]


def test_frequent_skips_are_counted_over_a_resume_and_told_by_one_rank(run: RunDirectory) -> None:
    before, after, loop = new_guard(run), new_guard(run), FakeLoop()
    for _ in range(3):
        take(before, loop, 1.0, math.nan)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    loop.rank = 1
    after_on_other = new_guard(run)
    after_on_other.load_state_dict(before.state_dict())
    take(after_on_other, loop, 1.0, math.nan)
    assert "skips_frequent" not in {event for _, event, _ in events(run)}
    loop.rank, loop.step = 0, 3
    take(after, loop, 1.0, math.nan)
    assert [step for step, event, _ in events(run) if event == "skips_frequent"] == [4]


def test_losses_of_a_validation_are_no_part_of_the_next_step(run: RunDirectory) -> None:
    guard, loop = new_guard(run), FakeLoop()
    guard.on_losses(loop, [losses(5000.0, 10)])
    assert take(guard, loop, 2.0)
    assert list(guard.detector.taken) == [(2.0, 1.0)]


def test_losses_count_from_the_first_without_a_step_start(run: RunDirectory) -> None:
    guard, loop = new_guard(run), FakeLoop()
    guard.on_losses(loop, [losses(20.0, 10)])
    assert guard.allows_step(loop, 1.0)
    assert list(guard.detector.taken) == [(2.0, 1.0)]


def test_a_skipped_step_is_counted_logged_and_recorded(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    guard, loop = new_guard(run), FakeLoop(step=6)
    with caplog.at_level(logging.WARNING):
        assert take(guard, loop, math.nan) is False
    assert guard.skipped_steps == 1
    assert events(run) == [(7, "step_skipped", "loss is nan")]
    assert caplog.messages == ["step 7 is skipped on all ranks: loss is nan"]
    assert list(guard.detector.taken) == []


def test_only_rank_0_records_a_skipped_step(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    guard = new_guard(run)
    assert not take(guard, FakeLoop(rank=1), math.nan)
    assert guard.skipped_steps == 1
    assert events(run) == [] and caplog.messages == []


def test_a_spike_is_skipped_by_the_settings_of_the_run(run: RunDirectory) -> None:
    lenient, strict = new_guard(run, spike_sigmas=None), new_guard(run, spike_sigmas=3.0)
    for guard in (lenient, strict):
        assert all(take(guard, FakeLoop(), 2.0) for _ in range(WINDOW))
    assert take(lenient, FakeLoop(), 50.0)
    assert not take(strict, FakeLoop(), 50.0)


def test_too_many_skipped_steps_in_a_row_end_the_run(run: RunDirectory) -> None:
    guard, loop = new_guard(run, max_skipped_in_a_row=2), FakeLoop(step=4)
    assert not take(guard, loop, math.nan)
    with pytest.raises(TrainingError) as caught:
        take(guard, loop, math.inf)
    assert str(caught.value) == (
        "step 6: 2 steps in a row would have harmed the model; the last one: loss is inf. Continue from the last "
        "checkpoint with a lower optim.lr under another name, look at the rows of these steps, or raise "
        "faults.max_skipped_in_a_row."
    )
    assert [step for step, _, _ in events(run)] == [5, 6]


def test_skipped_steps_spread_over_a_run_do_not_end_it(run: RunDirectory) -> None:
    guard, loop = new_guard(run, max_skipped_in_a_row=2), FakeLoop()
    for _ in range(8):
        assert not take(guard, loop, math.nan)
        assert take(guard, loop, 2.0)
    assert guard.skipped_steps == 8


def test_a_resumed_run_counts_on_and_judges_by_the_same_window(run: RunDirectory) -> None:
    guard, loop = new_guard(run, max_skipped_in_a_row=3), FakeLoop()
    assert all(take(guard, loop, loss) for loss in (9.0, 1.0, 2.0, 3.0, 4.0))
    assert not take(guard, loop, math.nan) and not take(guard, loop, math.nan)
    state = json.loads(json.dumps(guard.state_dict()))
    assert state == {
        "skipped_steps": 2,
        "in_a_row": 2,
        "without_targets": 0,
        "skipped_at": [6, 7],
        "taken": [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]],
    }

    resumed = new_guard(run, max_skipped_in_a_row=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert list(resumed.detector.taken) == list(guard.detector.taken)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        take(resumed, loop, math.nan)


def test_a_loaded_window_replaces_the_one_that_was_there(run: RunDirectory) -> None:
    guard, loop = new_guard(run), FakeLoop()
    assert all(take(guard, loop, 100.0) for _ in range(WINDOW))
    guard.load_state_dict({"skipped_steps": 0, "in_a_row": 0, "taken": [[2.0, 1.0], [3.0, 1.0]]})
    assert list(guard.detector.taken) == [(2.0, 1.0), (3.0, 1.0)]


def test_a_new_guard_has_skipped_nothing(run: RunDirectory) -> None:
    nothing = {"skipped_steps": 0, "in_a_row": 0, "without_targets": 0, "skipped_at": [], "taken": []}
    assert new_guard(run).state_dict() == nothing


def test_the_loss_is_that_of_all_ranks(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_other_rank(sums: torch.Tensor) -> None:
        sums += torch.tensor([70.0, 10.0], dtype=torch.float64)

    monkeypatch.setattr(torch.distributed, "all_reduce", add_other_rank)
    guard = new_guard(run)
    assert take(guard, FakeLoop(), 2.0)
    assert list(guard.detector.taken) == [((2.0 * 40 + 70.0) / 50, 1.0)]


@pytest.mark.parametrize(
    ("rows", "named"),
    [(1, "r1"), (4, "r1, r2, r3, r4"), (5, "r1, r2, r3, r4 and 1 more"), (9, "r1, r2, r3, r4 and 5 more")],
)
def test_the_rows_of_a_step_without_targets_are_its_own(rows: int, named: str, run: RunDirectory) -> None:
    asked: list[int] = []

    def rows_of_step(step: int) -> list[str]:
        asked.append(step)
        return [f"r{number}" for number in range(1, rows + 1)]

    guard, loop = StepGuard(FaultsConfig(), run, rows_of_step), FakeLoop(step=6)
    guard.on_step_start(loop)
    assert not guard.allows_step(loop, 0.0)
    assert asked == [7] and events(run) == [(7, "no_targets", named)]
