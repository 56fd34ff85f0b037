"""What a report says of the time a stage trained: losses by group, waits, goodput, events."""

import json
import math
from pathlib import Path

import pytest

from nemo_prolong.report.training import telemetry_tables
from nemo_prolong.report.training.figures import position_figure
from nemo_prolong.report.training.read import read_lineage
from nemo_prolong.report.training.run import write_report
from nemo_prolong.report.training.summary import summarize
from nemo_prolong.report.training.telemetry import changes
from tests.support.html_page import Page


def records(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines() if '"loss":' in line]


def mean_of(steps, key, name):
    groups = [step[key][name] for step in steps]
    return math.fsum(g["loss_sum"] for g in groups) / sum(g["target_tokens"] for g in groups)


def cells(table):
    return [[cell.text for cell in row] for row in table.rows]


@pytest.fixture
def stages(tree):
    return read_lineage(tree.runs, None).stages


@pytest.mark.parametrize("key", ["loss_by_position", "loss_by_domain"])
def test_losses_by_group_are_means_of_first_and_last_steps(tree, stages, key):
    # 20 steps are more than 5% of 200.
    steps = records(tree.runs[0])
    for change in changes(stages[0].steps, key):
        assert change.first_loss == pytest.approx(mean_of(steps[:20], key, change.name))
        assert change.last_loss == pytest.approx(mean_of(steps[-20:], key, change.name))
        assert change.target_tokens == sum(step[key][change.name]["target_tokens"] for step in steps)
    assert len(changes(stages[0].steps, key)) == 2
    long = changes(4 * stages[0].steps, key)
    assert long[0].last_loss == pytest.approx(mean_of(steps[-40:], key, long[0].name)), "5% of 800 steps are 40"


def test_domains_stand_with_their_share_the_largest_first(stages):
    rows = cells(telemetry_tables.domain_table(stages))
    assert [row[1] for row in rows] == ["code", "docs"] * 4
    shares = [float(row[2].rstrip("%")) for row in rows[:2]]
    assert shares == pytest.approx([66.7, 33.3], abs=0.2)


def test_positions_are_drawn_and_tabled_for_every_stage(stages):
    figure = position_figure(stages)
    assert [entry.label for entry in figure.legend] == ["base", "stage1", "stage2", "sft"]
    assert figure.wide.count("mark solid") == 2 * 4
    rows = cells(telemetry_tables.position_table(stages))
    assert [row[1] for row in rows[:2]] == ["0\u2013256", "256\u2013512"]


def test_speed_waits_and_goodput_are_held_to_the_configuration(tree, stages):
    table = telemetry_tables.performance_table(stages)
    facts = {row[0]: row[1] for row in cells(table)}
    assert facts["ranks, of planned"] == "1 of 2"
    planned = 200 * 8 * 512
    percent = f"{100 * stages[0].tokens_trained / planned:.1f}".removesuffix(".0")
    assert facts["real tokens, of planned row tokens"] == f"792K of 800K ({percent}%)"
    steps = records(tree.runs[0])
    share = sum(step["target_tokens"] for step in steps) / sum(step["row_tokens"] for step in steps)
    assert facts["target tokens in a row"] == f"{100 * share:.1f}%"
    assert facts["MFU (BF16 peak)"] == "31%" and facts["model TFLOP/s and rank"] == "307"
    assert facts["waiting for rows, of step time"] == "2%"
    assert (facts["restarts"], facts["skipped steps"], facts["checkpoints saved"]) == ("1", "1", "1")
    useful = sum(step["step_seconds"] for step in steps if step["step"] != 15)
    begin = min([1.79e9, steps[0]["time"] - steps[0]["step_seconds"]])
    assert facts["goodput"] == f"{100 * useful / (steps[-1]['time'] - begin):.1f}%"


def test_events_are_listed_in_order_and_saves_only_counted(stages):
    rows = cells(telemetry_tables.events_table(stages[:1]))
    assert [row[3] for row in rows] == ["started", "stopped by signal", "resumed", "step skipped", "complete"]
    assert rows[2][1:] == ["2026-09-21 14:13:34", "14", "resumed", "from step_00000014, on 1 rank"]


def test_of_very_many_events_the_last_ones_are_listed(tree):
    path = Path(tree.runs[0]) / "events.jsonl"
    line = {"time": 1.79e9, "event": "step_skipped", "detail": "loss is nan"}
    path.write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(500)))
    rows = cells(telemetry_tables.events_table(read_lineage(tree.runs, None).stages[:1]))
    assert [row[2] for row in rows] == [str(step) for step in range(460, 500)]


def test_the_page_shows_all_and_the_summary_the_numbers(tree):
    page, path = write_report(tree.config())
    text = Page(page.read_text("utf-8")).text
    for words in ("Training loss by position", "Training loss by domain", "Speed, waits and goodput", "Events",
                  "loss is nan", "from step_00000014", "1 of 2"):  # fmt: skip
        assert words in text, words
    stage = json.loads(path.read_text())["stages"][0]
    assert stage["mfu"] == 0.31 and stage["skipped_steps"] == 1
    assert stage["events"]["resumed"] == 1 and set(stage["loss_by_domain"]) == {"code", "docs"}


def test_a_run_of_an_earlier_version_has_a_shorter_report(tree):
    for run in tree.runs:
        (Path(run) / "events.jsonl").unlink()
        kept = ("step", "loss", "real_tokens", "consumed_train_tokens", "step_seconds", "memory_bytes", "time")
        steps = [{key: step[key] for key in kept} for step in records(run)]
        (Path(run) / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page, _ = write_report(tree.config())
    text = Page(page.read_text("utf-8")).text
    assert "loss by position" not in text and "loss by domain" not in text and "Events" not in text
    assert (
        "MFU: model FLOPs over the dense BF16 peak of the device, in every precision; causal, per document, forward + "
        "2 x backward, no recomputation. Goodput:"
    ) in text
    assert "Speed, waits and goodput" in text and "MFU (BF16 peak) \u2013" not in text


def test_events_that_cannot_be_read_are_counted_and_said(tree):
    path = Path(tree.runs[1]) / "events.jsonl"
    path.write_text(path.read_text() + 'null\n{"time": 1}\n{"cut')
    stage = read_lineage(tree.runs, None).stages[1]
    assert len(stage.events) == 6
    assert stage.notes == [f"{path}: 2 unreadable line(s) skipped; a run that is killed may leave one."]


def test_words_of_an_event_cannot_become_markup(tree):
    path = Path(tree.runs[0]) / "events.jsonl"
    path.write_text(json.dumps({"time": 1.0, "step": 1, "event": "<b>", "detail": "<script>x</script>"}) + "\n")
    page, _ = write_report(tree.config())
    assert "<script" not in page.read_text("utf-8")


def test_the_numbers_of_a_summary_are_finite_or_null(tree):
    run = Path(tree.runs[0])
    steps = records(run)
    for step in steps[-20:]:
        for group in step["loss_by_domain"].values():
            group["loss_sum"] = math.nan
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    losses = summarize(read_lineage(tree.runs, None))["stages"][0]["loss_by_domain"]
    assert losses["code"]["last_loss"] is None and losses["code"]["first_loss"] > 0
