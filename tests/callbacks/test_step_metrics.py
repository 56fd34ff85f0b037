"""What a step and a validation leave in the records, in the log and at the trackers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_prolong.callbacks import step_metrics
from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.callbacks.step_metrics import StepMetrics
from nemo_prolong.config.schema import FaultsConfig
from nemo_prolong.ops.token_loss import LossSums
from nemo_prolong.plan.flops import training_flops_of_sums
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import EventRecord, GroupLoss, StepRecord, ValidationRecord
from tests.support.fake_loop import FakeLoop
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("one_rank", "clock", "trackers")

BUCKETS = 4
BATCH = SimpleNamespace(real_tokens=60, squared_tokens=1000, data_wait_seconds=0.25)


class Clock:
    """Unix time and the clock of a process, which a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now - 900.0


@dataclass
class FakeTrackers:
    """Keeps what trackers are handed."""

    cfg: Any
    run: RunDirectory
    step: int
    logged: list[tuple[dict[str, float], int, float]] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)

    def log(self, figures: dict[str, float], step: int, unix_time: float) -> None:
        self.logged.append((figures, step, unix_time))

    def close(self, *, succeeded: bool) -> None:
        self.closed.append(succeeded)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_metrics, "time", clock)
    return clock


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTrackers]:
    made: list[FakeTrackers] = []

    def make(*args: Any) -> FakeTrackers:
        made.append(FakeTrackers(*args))
        return made[-1]

    monkeypatch.setattr(step_metrics, "Trackers", make)
    return made


@dataclass
class Stage:
    """Metrics of a stage, and the loop that calls them."""

    metrics: StepMetrics
    guard: StepGuard
    loop: FakeLoop
    clock: Clock
    waited_seconds: float = 0.0

    def start(self) -> Stage:
        self.metrics.on_train_start(self.loop)
        return self

    def losses(self, *sums: tuple[float, int, str]) -> None:
        outputs = []
        for total, targets, domain in sums:
            by_position = torch.zeros(2, BUCKETS, dtype=torch.float64)
            by_position[:, 1] = torch.tensor([total, targets], dtype=torch.float64)
            counts = by_position[1].to(torch.int64)
            outputs.append(
                {
                    "loss_sum_and_ub_size": torch.tensor([total, targets], dtype=torch.float64),
                    "loss_by_position": LossSums(by_position[0], counts),
                    "domain": domain,
                }
            )
        self.metrics.on_losses(self.loop, outputs)

    def step(self, seconds: float = 2.0, skipped: bool = False) -> None:
        """Train a step of two micro-batches."""
        self.clock.now += 0.5
        self.metrics.on_step_start(self.loop)
        for _ in range(2):
            self.metrics.on_micro_batch_end(self.loop, BATCH)  # type: ignore[arg-type]
        self.losses((60.0, 30, "code"), (20.0, 10, "books"))
        self.clock.now += seconds
        self.guard.skipped_steps += skipped
        self.loop.step += 1
        self.metrics.on_step_end(self.loop)


@pytest.fixture
def new_stage(run: RunDirectory, clock: Clock) -> Callable[..., Stage]:
    def make(loop: FakeLoop | None = None, **changes: Any) -> Stage:
        cfg = tiny_config(Path("data"), run.path.parent, **changes)
        guard = StepGuard(FaultsConfig(), run, lambda step: [])
        stage = Stage(None, guard, loop or FakeLoop(), clock)  # type: ignore[arg-type]
        stage.metrics = StepMetrics(cfg, run, guard, lambda: stage.waited_seconds)
        return stage

    return make


def records(run: RunDirectory) -> list[Any]:
    return run.metrics().records


def test_the_record_of_a_step_has_its_exact_sums(new_stage: Any, run: RunDirectory) -> None:
    stage = new_stage(FakeLoop(world_size=2)).start()
    stage.waited_seconds = 1.25
    stage.step()
    (record,) = records(run)
    flops = training_flops_of_sums(stage.metrics.cfg.model, 120, 2000)
    memory_bytes = record.memory_bytes
    assert memory_bytes > 10 * 2**20 and memory_bytes % 1024 == 0
    assert record == StepRecord(
        step=1,
        loss=2.0,
        grad_norm=1.5,
        learning_rate=1e-3,
        target_tokens=40,
        real_tokens=120,
        row_tokens=256,
        consumed_train_tokens=120,
        step_seconds=2.0,
        tokens_per_second=60.0,
        tokens_per_second_per_rank=30.0,
        row_tokens_per_second=128.0,
        model_flops=flops,
        model_flops_per_second=round(flops / 2),
        model_flops_per_second_per_rank=round(flops / 4),
        data_wait_seconds=0.5,
        checkpoint_seconds=1.25,
        memory_bytes=memory_bytes,
        skipped_steps=0,
        goodput=0.8,
        loss_by_position={
            "0-7": GroupLoss(0.0, 0),
            "8-15": GroupLoss(80.0, 40),
            "16-31": GroupLoss(0.0, 0),
            "32-63": GroupLoss(0.0, 0),
        },
        loss_by_domain={"books": GroupLoss(20.0, 10), "code": GroupLoss(60.0, 30)},
        time=1002.5,
    )


def test_seconds_are_rounded_and_start_with_the_step(new_stage: Any, run: RunDirectory) -> None:
    stage = new_stage().start()
    stage.waited_seconds = 0.123456
    stage.step(seconds=1.0000349)
    stage.metrics.on_step_start(stage.loop)
    stage.metrics.on_micro_batch_end(stage.loop, SimpleNamespace(**vars(BATCH) | {"data_wait_seconds": 0.0123456}))
    stage.clock.now += 0.3333333
    stage.waited_seconds = 1.0
    stage.metrics.on_step_end(stage.loop)
    first, second = records(run)
    assert (first.step_seconds, first.time, first.checkpoint_seconds) == (1.0, 1001.5, 0.1235)
    assert (second.step_seconds, second.time, second.checkpoint_seconds) == (0.3333, 1001.833, 0.8765)
    assert (second.data_wait_seconds, second.goodput) == (0.0123, 0.7273)


def test_counters_go_on_after_a_resume(new_stage: Any, run: RunDirectory) -> None:
    stage = new_stage().start()
    assert stage.metrics.state_dict() == {"tokens": 0, "target_tokens": 0}
    stage.step()
    stage.step()
    assert stage.metrics.state_dict() == {"tokens": 240, "target_tokens": 80}
    resumed = new_stage(FakeLoop(step=2))
    resumed.metrics.load_state_dict(stage.metrics.state_dict())
    resumed.start().step()
    assert resumed.metrics.state_dict() == {"tokens": 360, "target_tokens": 120}
    assert [(record.step, record.consumed_train_tokens) for record in records(run)] == [(1, 120), (2, 240), (3, 360)]


def test_other_ranks_count_and_write_nothing(new_stage: Any, run: RunDirectory, trackers: Any) -> None:
    stage = new_stage(FakeLoop(rank=1)).start()
    stage.step()
    assert stage.metrics.state_dict() == {"tokens": 120, "target_tokens": 40}
    stage.losses((3.0, 1, "code"))
    stage.metrics.on_validation_end(stage.loop)
    stage.metrics.on_end(stage.loop)
    stage.metrics.on_exception(stage.loop)
    assert records(run) == [] and trackers == []


def test_each_row_and_each_loss_is_counted_on_one_rank(new_stage: Any) -> None:
    shares_rows = new_stage(FakeLoop(counts_rows=False)).start()
    shares_rows.step()
    assert shares_rows.metrics.state_dict() == {"tokens": 0, "target_tokens": 40}
    shares_losses = new_stage(FakeLoop(counts_losses=False)).start()
    shares_losses.step()
    assert shares_losses.metrics.state_dict() == {"tokens": 120, "target_tokens": 0}


def test_a_rank_that_counts_no_rows_still_tells_how_long_it_waited(new_stage: Any, run: RunDirectory) -> None:
    stage = new_stage(FakeLoop(counts_rows=False)).start()
    stage.step()
    assert records(run)[0].data_wait_seconds == 0.5


def test_time_of_a_skipped_step_is_not_useful(new_stage: Any, run: RunDirectory) -> None:
    stage = new_stage().start()
    stage.step(seconds=1.5)
    stage.step(seconds=1.5, skipped=True)
    stage.step(seconds=1.5)
    # Of 2, 4 and 6 seconds since the start.
    assert [record.goodput for record in records(run)] == [0.75, 0.375, 0.5]
    assert [record.skipped_steps for record in records(run)] == [0, 1, 1]


def test_goodput_of_a_resumed_run_is_over_all_its_starts(new_stage: Any, run: RunDirectory, clock: Clock) -> None:
    run.path.mkdir(exist_ok=True)
    EventRecord(time=990.0, step=0, event="started", detail="").append_to(run.events_file)
    StepRecord(
        step=1, loss=1.0, real_tokens=1, consumed_train_tokens=1, step_seconds=5.0, skipped_steps=0, time=996.0
    ).append_to(run.metrics_file)
    stage = new_stage(FakeLoop(step=1))
    stage.guard.skipped_steps = 3
    stage.start().step(seconds=7.5)
    # 5 and 7.5 useful seconds of 18. The three skipped steps are of before.
    assert records(run)[-1].goodput == round(12.5 / 18, 4)
    assert records(run)[-1].skipped_steps == 3


def test_a_validation_is_a_record_and_no_part_of_the_next_step(
    new_stage: Any, run: RunDirectory, caplog: pytest.LogCaptureFixture, trackers: list[FakeTrackers]
) -> None:
    stage = new_stage(FakeLoop(step=7)).start()
    stage.losses((6000.0, 3000, "code"))
    stage.clock.now += 1.23456
    with caplog.at_level(logging.INFO):
        stage.metrics.on_validation_end(stage.loop)
    stage.step()
    validation, step = records(run)
    by_position = validation.val_loss_by_position
    assert validation == ValidationRecord(
        step=7,
        val_loss=2.0,
        val_target_tokens=3000,
        val_loss_by_position=by_position,
        val_loss_by_domain={"code": GroupLoss(6000.0, 3000)},
        time=1001.235,
    )
    assert by_position["8-15"] == GroupLoss(6000.0, 3000)
    assert caplog.messages == ["step 7  validation loss 2.0000 on 3,000 tokens"]
    assert (step.loss, step.target_tokens) == (2.0, 40)
    assert [(entry[1], entry[2]) for entry in trackers[0].logged] == [(7, 1001.235), (8, step.time)]
    assert trackers[0].logged[0][0]["val/loss"] == 2.0


def test_progress_is_logged_every_few_steps_and_at_both_ends(new_stage: Any, caplog: pytest.LogCaptureFixture) -> None:
    stage = new_stage(train={"train_iters": 10, "log_every_n_steps": 4}).start()
    with caplog.at_level(logging.INFO):
        for _ in range(10):
            stage.step()
    first, *others = caplog.messages
    assert (
        first
        == "step  1/10  loss 2.0000  grad norm 1.500  lr 1.00e-03  60 tokens/s  targets 15.6%  120 tokens  ETA 18s"
    )
    assert [line.split("  loss")[0] for line in others] == ["step  4/10", "step  8/10", "step 10/10"]
    assert others[-1].endswith("1200 tokens  ETA 0s")


def test_what_is_left_is_told_by_the_median_of_the_last_20_steps(
    new_stage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stage = new_stage(train={"train_iters": 100, "log_every_n_steps": 40}).start()
    for seconds in (50.0,) * 19 + (1.0,) * 11 + (3.0,) * 9:
        stage.step(seconds)
    with caplog.at_level(logging.INFO):
        stage.step(3.0)
    # Ten of 1 s and ten of 3 s.
    assert caplog.messages[-1].startswith("step  40/100") and caplog.messages[-1].endswith("ETA 2m00s")


def test_mfu_is_logged_where_the_peak_is_known(
    new_stage: Any, run: RunDirectory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_metrics, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    stage = new_stage(precision={"compute": "bf16"}).start()
    monkeypatch.setattr(stage.metrics._performance, "_peaks", {"mfu": 4 * records_flops(stage)})
    with caplog.at_level(logging.INFO):
        stage.step(0.5)
    assert records(run)[0].mfu == 0.5
    assert "240 tokens/s  MFU 50.0%  targets 15.6%  120 tokens" in caplog.messages[-1]


def records_flops(stage: Stage) -> int:
    return training_flops_of_sums(stage.metrics.cfg.model, 120, 2000)


def test_a_step_without_a_target_token_has_no_loss_in_the_log(
    new_stage: Any, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    stage = new_stage().start()
    stage.metrics.on_step_start(stage.loop)
    stage.metrics.on_micro_batch_end(stage.loop, BATCH)
    stage.clock.now += 2.0
    stage.loop.step += 1
    with caplog.at_level(logging.INFO):
        stage.metrics.on_step_end(stage.loop)
    assert "step 1/4  loss none  grad norm 1.500" in caplog.messages[-1]
    assert "  targets 0.0%  " in caplog.messages[-1]
    assert math.isnan(records(run)[0].loss)


def test_thousands_of_tokens_a_second_have_a_comma(new_stage: Any, caplog: pytest.LogCaptureFixture) -> None:
    stage = new_stage().start()
    with caplog.at_level(logging.INFO):
        stage.step(0.0625)
    assert "  1,920 tokens/s  " in caplog.messages[-1]


def test_a_disk_that_is_full_loses_the_record_and_not_the_run(
    new_stage: Any, run: RunDirectory, caplog: pytest.LogCaptureFixture, trackers: list[FakeTrackers]
) -> None:
    stage = new_stage().start()
    os.mkdir(run.metrics_file)
    stage.step()
    message = f"the record of step 1 could not be written: [Errno 21] Is a directory: '{run.metrics_file}'"
    assert message in caplog.messages
    ((figures, step, unix_time),) = trackers[0].logged
    assert (figures["train/loss"], step, unix_time) == (2.0, 1, 1002.5)


def test_trackers_are_opened_with_the_run_and_closed_with_its_end(
    new_stage: Any, run: RunDirectory, trackers: list[FakeTrackers]
) -> None:
    ended = new_stage(FakeLoop(step=3)).start()
    ended.metrics.on_end(ended.loop)
    failed = new_stage().start()
    failed.metrics.on_exception(failed.loop)
    assert [(made.cfg, made.run, made.step) for made in trackers] == [
        (ended.metrics.cfg, run, 3),
        (failed.metrics.cfg, run, 0),
    ]
    assert [made.closed for made in trackers] == [[True], [False]]


def test_a_run_that_fails_before_it_trains_has_no_trackers_to_close(new_stage: Any, trackers: Any) -> None:
    stage = new_stage()
    stage.metrics.on_exception(stage.loop)
    assert trackers == []
