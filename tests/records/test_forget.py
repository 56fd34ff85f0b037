"""What a resumed run does to the records it has."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_prolong.records.run_log import forget_steps_after


def test_records_of_steps_trained_again_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 5.0 - step} for step in (1, 2, 3)]
    records.insert(2, {"step": 2, "val_loss": 4.0})
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    forget_steps_after(tmp_path / "metrics.jsonl", 2)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == records[:3]


def test_a_run_without_records_has_nothing_to_forget(tmp_path: Path) -> None:
    forget_steps_after(tmp_path / "metrics.jsonl", 2)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_after_one_that_cannot_be_read_are_kept(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2)]
    metrics.write_text("\n".join([good[0], "{", "{}", good[1], ""]))
    forget_steps_after(metrics, 2)
    assert metrics.read_text().splitlines() == good
