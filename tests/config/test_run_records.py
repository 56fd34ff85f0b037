"""Files of records that grow, are cut and are replaced; and the goodput that follows from them."""

from __future__ import annotations

import json

import pytest

from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.run_log import GrowingRecords, goodput


def line(**record):
    return json.dumps(record) + "\n"


def test_new_lines_are_read_once_and_only_when_finished(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = GrowingRecords(path)
    file.refresh()
    assert file.records == []
    with path.open("a") as writer:
        writer.write(line(step=1) + '{"step"')
        writer.flush()
        file.refresh()
        assert file.records == [{"step": 1}]
        writer.write(": 2}\n")
        writer.flush()
    file.refresh()
    file.refresh()
    assert file.records == [{"step": 1}, {"step": 2}] and file.unreadable == 0


def test_a_file_that_a_resumed_run_replaces_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(step=1) + line(step=2) + line(step=3))
    file = GrowingRecords(path)
    file.refresh()
    write_text_atomically(path, line(step=1) + line(step=2, again=True) + line(step=3, again=True) + line(step=4))
    file.refresh()
    assert [record["step"] for record in file.records] == [1, 2, 3, 4] and file.records[1]["again"]
    path.write_text(line(step=9))
    file.refresh()
    assert file.records == [{"step": 9}]
    path.unlink()
    file.refresh()
    assert file.records == []


def test_lines_that_are_no_records_are_counted(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(line(step=1).encode() + b"null\n[1]\n\xff\xfe\n{\n\n" + line(step=2).encode())
    file = GrowingRecords(path)
    file.refresh()
    assert [record["step"] for record in file.records] == [1, 2] and file.unreadable == 4


def step(number, time, seconds=1.0, **more):
    return {"step": number, "loss": 1.0, "step_seconds": seconds, "time": time, **more}


def test_goodput_is_time_of_steps_over_time_since_the_start():
    events = [{"time": 90.0, "step": 0, "event": "started"}]
    found = goodput(
        [step(1, 101.0), step(2, 102.0), {"step": 2, "val_loss": 1.0, "time": 105.0}, step(3, 110.0)], events
    )
    assert found.useful_seconds == 3.0 and found.wall_seconds == 20.0
    assert found.fraction == pytest.approx(0.15)


def test_time_between_restarts_and_repeated_steps_is_lost():
    # Killed after step 3, resumed 100 seconds later from step 1.
    before = [step(1, 101.0), step(2, 102.0), step(3, 103.0)]
    after = [step(2, 203.0, seconds=2.0), step(3, 205.0, seconds=2.0)]
    events = [{"time": 100.0, "step": 0, "event": "started"}, {"time": 200.0, "step": 1, "event": "resumed"}]
    found = goodput([*before, *after], events)
    assert found.useful_seconds == 5.0 and found.wall_seconds == 105.0
    # As after forget_steps_after: the same.
    assert goodput([before[0], *after], events) == found


def test_a_skipped_step_is_lost_and_the_steps_after_it_are_not():
    records = [step(1, 101.0, skipped_steps=0), step(2, 102.0, skipped_steps=1), step(3, 103.0, skipped_steps=1)]
    assert goodput(records, []).useful_seconds == 2.0


def test_a_run_that_only_started_has_no_useful_time():
    assert goodput([], []) is None
    started = goodput([], [{"time": 5.0, "step": 0, "event": "started"}])
    assert started.fraction == 0.0 and started.wall_seconds == 0.0
    assert goodput([step(1, 101.0)], []).fraction == 1.0
