"""When the writer saves, what it reports and deletes, and when it gives up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_prolong.callbacks import checkpoint_writer
from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory, listed_steps
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fake_checkpoint import write_checkpoint
from tests.support.fake_loop import FakeLoop, FakeSave
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank", "clock")

TRAIN_ITERS = 100


class Clock:
    """Seconds that a test sets."""

    now = 5000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpoint_writer, "time", clock)
    return clock


@pytest.fixture
def new_writer(run: RunDirectory) -> Callable[..., CheckpointWriter]:
    def make(train_iters: int = TRAIN_ITERS, **settings: Any) -> CheckpointWriter:
        checkpoint = {"save_interval_steps": 10, **settings}
        cfg = tiny_config(Path("data"), run.path.parent, train={"train_iters": train_iters}, checkpoint=checkpoint)
        return CheckpointWriter(cfg, run)

    return make


@pytest.fixture
def loop(run: RunDirectory) -> FakeLoop:
    return FakeLoop(run.path, train_iters=TRAIN_ITERS)


def steps_until(writer: CheckpointWriter, loop: FakeLoop, last: int) -> None:
    """Train up to a step."""
    while loop.step < last:
        loop.step += 1
        writer.on_step_end(loop)


def saved_steps(loop: FakeLoop) -> list[int]:
    return [save.step for save in loop.saves]


def events(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(event.step, event.event, event.detail) for event in run.events().records]


# ---- when ---------------------------------------------------------------------------------------------------------


def test_every_few_steps_and_the_last_step_are_saved(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer(train_iters=25)
    writer.on_train_start(loop)
    steps_until(writer, loop, 25)
    assert saved_steps(loop) == [10, 20, 25]


def test_the_first_step_is_saved_where_every_step_is(new_writer: Any, loop: FakeLoop) -> None:
    steps_until(new_writer(save_interval_steps=1), loop, 2)
    assert saved_steps(loop) == [1, 2]


def test_minutes_since_the_last_save_make_a_step_due(new_writer: Any, loop: FakeLoop, clock: Clock) -> None:
    writer = new_writer(save_interval_minutes=2)
    clock.now += 1000.0
    writer.on_train_start(loop)
    clock.now += 119.0
    steps_until(writer, loop, 1)
    assert saved_steps(loop) == []
    clock.now += 1.0
    steps_until(writer, loop, 2)
    assert saved_steps(loop) == [2]
    clock.now += 119.0
    steps_until(writer, loop, 3)
    assert saved_steps(loop) == [2]


def test_without_minutes_no_time_makes_a_step_due(new_writer: Any, loop: FakeLoop, clock: Clock) -> None:
    writer = new_writer()
    writer.on_train_start(loop)
    clock.now += 1e9
    steps_until(writer, loop, 9)
    assert saved_steps(loop) == []


def test_a_step_is_not_saved_twice(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer()
    steps_until(writer, loop, 10)
    writer.on_step_end(loop)
    assert saved_steps(loop) == [10]


def test_the_clock_starts_when_the_writer_is_made(new_writer: Any, loop: FakeLoop, clock: Clock) -> None:
    writer = new_writer(save_interval_minutes=1)
    clock.now += 30.0
    steps_until(writer, loop, 1)
    assert saved_steps(loop) == []


@pytest.mark.parametrize(("on_gpu", "setting", "background"), [(True, None, True), (False, None, False)])
def test_saves_are_in_the_background_where_there_is_a_gpu(
    on_gpu: bool, setting: bool | None, background: bool, new_writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    assert new_writer().background is background
    assert new_writer(async_save=not background).background is not background


# ---- how ------------------------------------------------------------------------------------------------------------


def test_a_save_that_waits_is_complete_before_the_next_step(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(save: FakeSave, **settings: Any) -> None:
        start(save, **settings)
        clock.now += 1.25

    def slower(save: FakeSave) -> None:
        complete(save)
        clock.now += 2.5

    start, complete = FakeSave.start, FakeSave.complete
    writer = new_writer()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(FakeSave, "start", slow)
        patch.setattr(FakeSave, "complete", slower)
        steps_until(writer, loop, 10)
    (save,) = loop.saves
    assert save.calls == ["start", "complete"]
    assert listed_steps(run.path) == [10]
    assert writer.waited_seconds() == 3.75
    detail = "4.4 KiB in 3.8 s, training waited 3.8 s"
    assert events(run) == [(10, "checkpoint_saved", f"step_00000010: {detail}")]
    assert caplog.messages == [f"saved {save.final}, {detail}"]
    writer.on_train_end(loop)
    assert save.calls == ["start", "complete"]


def test_a_save_in_the_background_is_complete_when_it_is_written(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, clock: Clock
) -> None:
    def slow(save: FakeSave) -> None:
        complete(save)
        clock.now += 0.25

    complete = FakeSave.complete
    writer = new_writer(async_save=True)
    loop.written = False
    steps_until(writer, loop, 12)
    (save,) = loop.saves
    assert save.calls == ["start in the background"] and events(run) == []
    clock.now += 60.0
    save.written = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeSave, "complete", slow)
        steps_until(writer, loop, 13)
    assert save.calls == ["start in the background", "complete"]
    detail = "step_00000010: 4.4 KiB in 60.2 s, training waited 0.2 s"
    assert events(run) == [(10, "checkpoint_saved", detail)]
    assert writer.waited_seconds() == 0.25


def test_the_next_save_waits_for_one_that_is_under_way(new_writer: Any, loop: FakeLoop, run: RunDirectory) -> None:
    writer = new_writer(async_save=True)
    loop.written = False
    steps_until(writer, loop, 20)
    first, second = loop.saves
    assert first.calls == ["start in the background", "complete"]
    assert second.calls == ["start in the background"]
    writer.on_train_end(loop)
    assert second.calls == ["start in the background", "complete"]
    assert listed_steps(run.path) == [10, 20]


def test_ranks_without_the_manifest_report_nothing(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSave, "complete", lambda save: None)
    met: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append("barrier"))
    steps_until(new_writer(), loop, 10)
    assert events(run) == [] and met == ["barrier"]


# ---- failures -------------------------------------------------------------------------------------------------------


def expected_error(loop: FakeLoop, in_a_row: int) -> str:
    return (
        f"{checkpoint_directory(loop.run_dir, loop.step)}: it could not be saved, {in_a_row} in a row: rank 0: the "
        "disk is full. Make room or repair the file system, then repeat the command: it continues from the newest good "
        "one."
    )


@pytest.mark.parametrize("fails_in", ["start", "complete"])
def test_a_save_that_fails_is_reported_and_training_goes_on(
    fails_in: str, new_writer: Any, loop: FakeLoop, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    writer = new_writer(max_failed_saves=2)
    loop.fails_in = fails_in
    steps_until(writer, loop, 10)
    assert loop.saves[0].calls[-1] == "abandon"
    assert events(run) == [(10, "checkpoint_failed", "rank 0: the disk is full")]
    assert caplog.messages == [
        "checkpoint of step 10 failed, the ones before it are untouched: rank 0: the disk is full"
    ]
    # One that succeeds in between starts the count anew.
    loop.fails_in = None
    steps_until(writer, loop, 20)
    loop.fails_in = fails_in
    steps_until(writer, loop, 39)
    assert [event for _, event, _ in events(run)] == ["checkpoint_failed", "checkpoint_saved", "checkpoint_failed"]
    with pytest.raises(CheckpointError) as caught:
        steps_until(writer, loop, 40)
    assert str(caught.value) == expected_error(loop, 2)


def test_a_failed_save_is_not_completed_again(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer()
    loop.fails_in = "complete"
    steps_until(writer, loop, 10)
    writer.on_train_end(loop)
    assert loop.saves[0].calls == ["start", "complete", "abandon"]


def test_other_ranks_leave_the_failed_files_to_rank_0(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = new_writer()
    loop.fails_in = "complete"
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    steps_until(writer, loop, 10)
    assert loop.saves[0].calls == ["start", "complete"] and events(run) == []


def test_a_last_step_that_cannot_be_saved_ends_the_run(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer()
    loop.step, loop.fails_in = TRAIN_ITERS - 1, "start"
    with pytest.raises(CheckpointError) as caught:
        steps_until(writer, loop, TRAIN_ITERS)
    assert str(caught.value) == expected_error(loop, 1)


# ---- before a stop --------------------------------------------------------------------------------------------------


def test_a_stop_saves_the_step_and_waits_for_it(new_writer: Any, loop: FakeLoop, run: RunDirectory) -> None:
    writer = new_writer(async_save=True)
    steps_until(writer, loop, 13)
    writer.save_before_stop(loop)
    assert saved_steps(loop) == [10, 13]
    assert listed_steps(run.path) == [10, 13]


def test_a_stop_in_a_step_that_is_saved_saves_it_once(new_writer: Any, loop: FakeLoop, run: RunDirectory) -> None:
    writer = new_writer(async_save=True)
    loop.written = False
    steps_until(writer, loop, 10)
    writer.save_before_stop(loop)
    assert saved_steps(loop) == [10] and listed_steps(run.path) == [10]


def test_a_stop_in_a_step_whose_save_failed_saves_it_again(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer()
    loop.fails_in = "complete"
    steps_until(writer, loop, 10)
    with pytest.raises(CheckpointError) as caught:
        writer.save_before_stop(loop)
    assert saved_steps(loop) == [10, 10]
    assert str(caught.value) == expected_error(loop, 2)


def test_a_stop_whose_save_fails_does_not_wait_for_more_failures(new_writer: Any, loop: FakeLoop) -> None:
    writer = new_writer(max_failed_saves=9)
    steps_until(writer, loop, 3)
    loop.fails_in = "start"
    with pytest.raises(CheckpointError, match="it could not be saved, 1 in a row"):
        writer.save_before_stop(loop)


def test_a_stop_before_the_first_step_saves_nothing(new_writer: Any, loop: FakeLoop) -> None:
    new_writer().save_before_stop(loop)
    assert loop.saves == []


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_what_is_superseded_is_deleted(new_writer: Any, loop: FakeLoop, run: RunDirectory) -> None:
    writer = new_writer(keep_last=2, keep_every_steps=30)
    points: list[str] = []
    writer.reached = points.append
    steps_until(writer, loop, 70)
    assert listed_steps(run.path) == [30, 60, 70]
    assert points == ["old_deleted"] * 7


def test_an_old_one_that_cannot_be_deleted_stays_with_a_warning(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def refuse(checkpoint: Path) -> None:
        raise OSError(f"{checkpoint.name} is in use")

    writer = new_writer(keep_last=1)
    monkeypatch.setattr(checkpoint_writer, "delete_checkpoint", refuse)
    steps_until(writer, loop, 20)
    assert listed_steps(run.path) == [10, 20]
    assert "an old checkpoint could not be deleted: step_00000010 is in use" in caplog.messages


def test_leftovers_of_a_killed_run_go_when_it_starts_again(
    new_writer: Any, loop: FakeLoop, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = run.path / "checkpoints" / "step_00000020.writing-1234"
    leftover.mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        loop.rank = 1
        new_writer().on_train_start(loop)
        assert leftover.exists() and caplog.messages == []
        loop.rank = 0
        new_writer().on_train_start(loop)
    assert not leftover.exists()
    assert caplog.messages == ["removed step_00000020.writing-1234, left by a process that was killed"]


def test_checkpoints_that_were_refused_at_the_start_are_not_kept(
    new_writer: Any, loop: FakeLoop, run: RunDirectory
) -> None:
    for step in (10, 20, 30):
        write_checkpoint(run.path, step)
    loop.step = 10
    writer = new_writer(keep_last=3)
    writer.on_train_start(loop)
    loop.step = 34
    steps_until(writer, loop, 40)
    assert listed_steps(run.path) == [10, 40]


def test_a_refused_step_that_is_saved_again_is_kept(new_writer: Any, loop: FakeLoop, run: RunDirectory) -> None:
    damaged = write_checkpoint(run.path, 20)
    loop.step = 10
    writer = new_writer(keep_last=2)
    writer.on_train_start(loop)
    damaged.rename(damaged.with_name("moved"))
    steps_until(writer, loop, 30)
    assert listed_steps(run.path) == [20, 30]
