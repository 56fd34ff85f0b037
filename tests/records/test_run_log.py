"""Files of records that grow, are cut and are replaced; and the goodput that follows from them."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.run_log import (
    EventRecord,
    Goodput,
    GroupLoss,
    GrowingLog,
    StepRecord,
    ValidationRecord,
    events_log,
    goodput,
    metrics_log,
    parse_metrics,
)


def line(step, **more):
    """Write a validation: the shortest record."""
    return json.dumps({"step": step, "val_loss": 1.0, **more}) + "\n"


def steps_of(log):
    return [record.step for record in log.records]


def test_new_lines_are_read_once_and_only_when_finished(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = GrowingLog(path, parse_metrics)
    file.refresh()
    assert file.records == []
    with path.open("a") as writer:
        writer.write(line(step=1) + '{"val_loss": 1.0, "step"')
        writer.flush()
        file.refresh()
        assert steps_of(file) == [1]
        writer.write(": 2}\n")
        writer.flush()
    file.refresh()
    file.refresh()
    assert steps_of(file) == [1, 2] and file.unreadable == 0


def test_the_last_line_of_a_run_that_ended_is_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(step=1) + '{"step": 2, "val')
    file = GrowingLog(path, parse_metrics)
    file.refresh(ended=True)
    assert steps_of(file) == [1] and file.unreadable == 1


def test_a_file_that_a_resumed_run_replaces_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(step=1) + line(step=2) + line(step=3))
    file = GrowingLog(path, parse_metrics)
    file.refresh()
    write_text_atomically(path, line(step=1) + line(step=2, val_loss=2.0) + line(step=3) + line(step=4))
    file.refresh()
    assert steps_of(file) == [1, 2, 3, 4] and file.records[1].val_loss == 2.0
    path.write_text(line(step=9))
    file.refresh()
    assert steps_of(file) == [9]
    path.unlink()
    file.refresh()
    assert file.records == []


def test_lines_that_are_no_records_are_counted(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(step=1).encode() + b"null\n[1]\n\xff\xfe\n{\n\n" + line(step=2).encode())
    file = GrowingLog(path, parse_metrics)
    file.refresh()
    assert steps_of(file) == [1, 2] and file.unreadable == 4


def step(number, time, seconds=1.0, **more):
    tokens = {"real_tokens": 1, "consumed_train_tokens": number}
    return StepRecord(step=number, loss=1.0, step_seconds=seconds, time=time, **tokens, **more)


def test_a_loss_that_is_no_number_is_null_on_disk_and_nan_in_memory(tmp_path):
    nothing = {"0-63": GroupLoss(math.nan, 3)}
    record = step(1, 1.0).model_copy(update={"loss": math.nan, "grad_norm": math.inf, "loss_by_position": nothing})
    path = tmp_path / "metrics.jsonl"
    record.append_to(path)
    ValidationRecord(step=1, val_loss=math.nan).append_to(path)
    lines = path.read_text().splitlines()
    assert "NaN" not in lines[0] + lines[1] and "Infinity" not in lines[0]
    assert json.loads(lines[0])["loss"] is None and json.loads(lines[1])["val_loss"] is None
    found, validation = (parse_metrics(json.loads(line)) for line in lines)
    assert math.isnan(found.loss) and found.grad_norm is None and math.isnan(validation.val_loss)
    assert math.isnan(found.loss_by_position["0-63"].loss_sum)


def test_the_mean_of_no_target_is_no_number():
    assert math.isnan(GroupLoss(0.0, 0).mean)
    assert GroupLoss(6.0, 4).mean == 1.5


def event(time, step, kind):
    return EventRecord(time=time, step=step, event=kind, detail="")


def test_goodput_is_time_of_steps_over_time_since_the_start():
    events = [event(90.0, 0, "started")]
    found = goodput(
        [step(1, 101.0), step(2, 102.0), ValidationRecord(step=2, val_loss=1.0, time=105.0), step(3, 110.0)], events
    )
    assert found.useful_seconds == 3.0 and found.wall_seconds == 20.0
    assert found.fraction == pytest.approx(0.15)


def test_time_between_restarts_and_repeated_steps_is_lost():
    # Killed after step 3, resumed 100 seconds later from step 1.
    before = [step(1, 101.0), step(2, 102.0), step(3, 103.0)]
    after = [step(2, 203.0, seconds=2.0), step(3, 205.0, seconds=2.0)]
    events = [event(100.0, 0, "started"), event(200.0, 1, "resumed")]
    found = goodput([*before, *after], events)
    assert found.useful_seconds == 5.0 and found.wall_seconds == 105.0
    # As after forget_steps_after: the same.
    assert goodput([before[0], *after], events) == found


def test_a_skipped_step_is_lost_and_the_steps_after_it_are_not():
    records = [step(1, 101.0, skipped_steps=0), step(2, 102.0, skipped_steps=1), step(3, 103.0, skipped_steps=1)]
    assert goodput(records, []).useful_seconds == 2.0


def test_a_run_that_only_started_has_no_useful_time():
    assert goodput([], []) is None
    started = goodput([], [event(5.0, 0, "started")])
    assert started.fraction == 0.0 and started.wall_seconds == 0.0
    assert goodput([step(1, 101.0)], []).fraction == 1.0


def test_a_group_has_the_mean_of_its_target_tokens():
    groups = GroupLoss(6.0, 3), GroupLoss(2.0, 1)
    assert [group.mean for group in groups] == [2.0, 2.0]
    assert math.isnan(GroupLoss(0.0, 0).mean)
    assert groups[0] + groups[1] == GroupLoss(8.0, 4)


def test_a_step_without_duration_has_no_speed():
    assert step(1, 1.0, seconds=0.5).real_tokens_per_second == 2.0
    assert math.isnan(step(1, 1.0, seconds=0.0).real_tokens_per_second)


def test_what_has_no_value_is_not_written(tmp_path):
    record = StepRecord(step=1, loss=2.0, real_tokens=3, consumed_train_tokens=3, step_seconds=1.0)
    record.append_to(tmp_path / "metrics.jsonl")
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(text) == {
        "step": 1,
        "loss": 2.0,
        "real_tokens": 3,
        "consumed_train_tokens": 3,
        "step_seconds": 1.0,
        "skipped_steps": 0,
        "loss_by_position": {},
        "loss_by_domain": {},
    }
    assert parse_metrics({**json.loads(text), "of a later version": 1}) == record


def test_records_do_not_change(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        event(1.0, 1, "started").step = 2


def test_the_logs_of_a_run_are_its_files(tmp_path):
    step(1, 1.0).append_to(tmp_path / "metrics.jsonl")
    event(1.0, 1, "started").append_to(tmp_path / "events.jsonl")
    for log, expected in ((metrics_log(tmp_path), step(1, 1.0)), (events_log(tmp_path), event(1.0, 1, "started"))):
        log.refresh()
        assert log.records == [expected]


def test_a_file_that_goes_and_comes_again_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(step=1) + "{}\n")
    file = GrowingLog(path, parse_metrics)
    file.refresh()
    assert (steps_of(file), file.unreadable) == ([1], 1)
    path.unlink()
    file.refresh()
    assert (steps_of(file), file.unreadable) == ([], 0)
    path.write_text(line(step=5))
    file.refresh()
    assert steps_of(file) == [5]


def test_goodput_before_any_time_has_passed_is_zero():
    assert Goodput(0.0, 5.0, 5.0).fraction == 0.0
    assert Goodput(1.0, 5.0, 5.5).fraction == 2.0


def test_a_step_of_an_earlier_version_without_time_counts_its_seconds():
    found = goodput([step(1, None, seconds=3.0)], [event(10.0, 0, "started"), event(20.0, 1, "stopped_by_signal")])
    assert found == Goodput(3.0, 10.0, 20.0)


def test_a_log_that_was_not_read_yet_holds_nothing(tmp_path):
    log = metrics_log(tmp_path)
    assert (log.records, log.unreadable) == ([], 0)


def test_lines_that_were_read_are_not_read_again(tmp_path):
    parsed = []
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(step=1) + line(step=2))
    log = GrowingLog(path, lambda record: parsed.append(record["step"]) or parse_metrics(record))
    for _ in range(3):
        log.refresh()
    assert parsed == [1, 2] and steps_of(log) == [1, 2]


def test_a_first_step_that_is_skipped_is_not_useful():
    assert goodput([step(1, 101.0, skipped_steps=1), step(2, 102.0, skipped_steps=1)], []).useful_seconds == 1.0


def test_a_validation_takes_no_time_before_its_record():
    assert goodput([ValidationRecord(step=1, val_loss=1.0, time=50.0)], []) == Goodput(0.0, 50.0, 50.0)
