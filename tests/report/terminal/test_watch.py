"""One frame of scripts/watch.py, and what changes in it while a run goes on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.errors import CheckpointError
from nemo_prolong.report.terminal.watch import RunWatch

SCRIPT = CONFIG_DIR.parent / "scripts" / "watch.py"


def text_of(watch, now=1.79e9):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(watch.frame(now))
    return console.export_text()


def fact(text, name):
    """Return what stands behind a name up to the next column."""
    return re.search(rf"\b{re.escape(name)}\s\s+(\S+(?: \S+)*)", text)[1]


@pytest.fixture
def run(tree):
    return Path(tree.runs[0])


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_frame_holds_the_figures_of_the_last_steps(run):
    text = text_of(RunWatch(run))
    steps = [record for record in records(run) if "loss" in record]
    recent = steps[-20:]
    assert "step 200 of 200" in text and "100.0%  complete" in text
    mean = sum(step["loss"] for step in recent) / 20
    assert f"loss             {steps[-1]['loss']:.3f}  (mean of 20: {mean:.3f})" in text
    assert fact(text, "validation loss") == f"{records(run)[-1]['val_loss']:.3f}"
    rate = sum(step["real_tokens"] for step in recent) / sum(step["step_seconds"] for step in recent)
    assert fact(text, "tokens/s") == f"{rate:,.0f}"
    assert (fact(text, "MFU (BF16 peak)"), fact(text, "skipped steps")) == ("31%", "1")
    assert fact(text, "waiting for rows") == "2.0% of step time"
    assert fact(text, "memory") == "1.3 GiB" and "307" in fact(text, "model TFLOP/s and rank")


def test_the_share_of_target_tokens_is_of_the_last_steps(run):
    recent = [record for record in records(run) if "loss" in record][-20:]
    share = sum(step["target_tokens"] for step in recent) / sum(step["row_tokens"] for step in recent)
    assert fact(text_of(RunWatch(run)), "targets") == f"{100 * share:.1f}%"


def test_a_step_without_a_target_has_no_loss_and_spoils_no_mean(run):
    steps = [record for record in records(run) if "loss" in record]
    steps[-1] |= {"loss": None, "target_tokens": 0, "grad_norm": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    mean = sum(step["loss"] for step in steps[-20:-1]) / 19
    assert f"loss             \u2013  (mean of 20: {mean:.3f})" in text_of(RunWatch(run))


def test_losses_by_group_are_means_over_the_last_steps(run):
    text = text_of(RunWatch(run))
    recent = [record for record in records(run) if "loss" in record][-20:]
    for key in ("loss_by_position", "loss_by_domain"):
        for name in recent[0][key]:
            groups = [record[key][name] for record in recent]
            mean = sum(group["loss_sum"] for group in groups) / sum(group["target_tokens"] for group in groups)
            assert re.search(rf"{name}\s+{mean:.3f}", text), name


def test_the_last_events_are_listed(run):
    text = text_of(RunWatch(run))
    assert "step_skipped" in text and "loss is nan" in text and "200 of 200 steps" in text


def test_a_running_stage_says_how_long_it_takes(tree, run):
    tree.edit_manifest(0, status="running", finished_at=None)
    lines = [json.dumps(record) for record in records(run) if record["step"] <= 100]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "events.jsonl").unlink()
    watch = RunWatch(run)
    seconds = sorted(record["step_seconds"] for record in records(run)[-30:] if "loss" in record)
    text = text_of(watch, now=1.79e9 + 101)
    assert "50.0%" in text and "ETA" in text and not watch.is_over
    eta = re.search(r"ETA (\d+)m(\d+)s", text)
    assert 100 * seconds[0] <= 60 * int(eta[1]) + int(eta[2]) <= 100 * seconds[-1]
    assert "nothing recorded for 10m00s" in text_of(watch, now=1.79e9 + 700)


def test_what_a_run_writes_is_in_the_next_frame(tree, run):
    tree.edit_manifest(0, status="running", finished_at=None)
    every = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("")
    watch = RunWatch(run)
    assert "step 0 of 200" in text_of(watch) and "no step yet" in text_of(watch)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(every[:3]) + "\n")
    assert "step 0 of 200" in text_of(watch)
    watch.refresh()
    assert "step 3 of 200" in text_of(watch)
    tree.edit_manifest(0, status="complete")
    watch.refresh()
    assert watch.is_over


def test_names_with_brackets_are_not_taken_for_markup(tree, run):
    tree.edit_manifest(0, name="[bold]demo[/nothing]")
    line = {"time": 1.79e9, "step": 3, "event": "[red]", "detail": "rows [1, 2] [/closed]"}
    (run / "events.jsonl").write_text(json.dumps(line) + "\n")
    text = text_of(RunWatch(run))
    assert "[bold]demo[/nothing]" in text and "rows [1, 2] [/closed]" in text


def test_control_characters_of_a_run_never_reach_the_terminal(tree, run):
    tree.edit_manifest(0, name="de\x1b[2Jmo")
    line = {"time": 1.79e9, "step": 3, "event": "e\x9b", "detail": "d\x1b]0;title\x07"}
    (run / "events.jsonl").write_text(json.dumps(line) + "\n")
    text = text_of(RunWatch(run))
    assert "de\\x1b[2Jmo" in text and "e\\x9b" in text and "d\\x1b]0;title\\x07" in text


def test_records_of_an_earlier_version_are_shown_in_part(run):
    kept = ("step", "loss", "grad_norm", "learning_rate", "real_tokens", "row_tokens", "consumed_train_tokens",
            "step_seconds", "memory_bytes", "time")  # fmt: skip
    steps = [{key: record[key] for key in kept} for record in records(run) if "loss" in record]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    text = text_of(RunWatch(run))
    assert fact(text, "MFU (BF16 peak)") == "\u2013" and "loss by position" not in text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a run directory has a stage\.json"):
        RunWatch(tmp_path)


def test_the_script_prints_a_frame_without_torch_or_one_line(run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), str(run), "--once"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demo/base: base, mini-llama, rows of 512" in done.stdout
    assert not re.search(r"\|\s+torch$", done.stderr, re.MULTILINE)
    refused = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert refused.returncode == 4 and refused.stderr.startswith(f"{tmp_path}: a run directory has a stage.json")
    assert refused.stderr.count("\n") == 1


def test_the_live_view_ends_with_the_run(run):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(run), "--seconds", "0.1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "step 200 of 200" in done.stdout
