import json
import statistics
from pathlib import Path

import pytest

from nemo_prolong.report.training.read import read_lineage
from nemo_prolong.report.training.run import write_report
from nemo_prolong.report.training.summary import summarize


def records(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def test_every_number_of_a_stage_is_the_one_in_its_files(tree):
    write_report(tree.config())
    summary = json.loads((tree.root / "summary.json").read_text())

    assert [stage["stage"] for stage in summary["stages"]] == ["base", "stage1", "stage2", "sft"]
    for run, stage in zip(tree.runs, summary["stages"], strict=True):
        steps, validations = records(run)
        manifest = json.loads((Path(run) / "stage.json").read_text())
        rates = [step["real_tokens"] / step["step_seconds"] for step in steps[3:]]
        assert stage["first_loss"] == steps[0]["loss"]
        assert stage["last_loss"] == steps[-1]["loss"]
        assert stage["last_validation_loss"] == validations[-1]["val_loss"]
        assert stage["tokens_trained"] == sum(step["real_tokens"] for step in steps)
        assert stage["tokens_per_second"] == pytest.approx(statistics.median(rates))
        assert stage["peak_memory_bytes"] == steps[0]["memory_bytes"]
        assert stage["wall_seconds"] == 270.0
        for key in ("seq_length", "rotary_base", "train_iters", "trained_context_length", "name"):
            assert stage[key] == manifest[key]
        assert stage["steps"] == manifest["train_iters"]
    assert [stage["transition"] for stage in summary["stages"]] == [
        "scratch", "weights", "weights_and_optimizer", "weights",
    ]  # fmt: skip
    assert summary["max_logit_difference"] == 3.1e-06
    assert summary["versions"]["megatron-core"] == "0.15.3"
    assert summary["machine"]["cpu_count"] >= 1 and summary["machine"]["memory_bytes"] > 2**30


def test_the_tables_of_every_model_are_those_of_its_evaluation(tree):
    summary = summarize(read_lineage(tree.runs, tree.export))
    assert [row["label"] for row in summary["perplexity"]] == ["base", "stage1", "stage2", "sft", "export"]
    for run, perplexity, recall in zip(tree.runs, summary["perplexity"], summary["recall"], strict=False):
        buckets = json.loads((Path(run) / "eval" / "perplexity.json").read_text())["buckets"]
        keys = ("start", "end", "tokens", "loss", "perplexity")
        assert perplexity["buckets"] == [{key: bucket[key] for key in keys} for bucket in buckets]
        assert perplexity["documents"] == 12
        assert recall["lengths"] == json.loads((Path(run) / "eval" / "recall.json").read_text())["lengths"]
    assert summary["perplexity"][-1]["through"] == "transformers"


def test_the_slow_first_steps_do_not_count_for_throughput(tree):
    run = Path(tree.runs[3])
    steps, _ = records(run)
    for step in steps[:3]:
        step["step_seconds"] *= 1000
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps[:6]))
    rates = [step["real_tokens"] / step["step_seconds"] for step in steps[3:6]]
    summary = summarize(read_lineage(tree.runs, None))
    assert summary["stages"][3]["tokens_per_second"] == pytest.approx(statistics.median(rates))


def test_numbers_that_are_not_numbers_are_null(tree):
    run = Path(tree.runs[3])
    steps, _ = records(run)
    steps[-1]["loss"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    write_report(tree.config())
    summary = json.loads((tree.root / "summary.json").read_text())
    assert summary["stages"][3]["last_loss"] is None
    assert summary["stages"][3]["last_validation_loss"] is None


def test_without_an_export_there_is_no_logit_difference(tree):
    assert summarize(read_lineage(tree.runs, None))["max_logit_difference"] is None


def test_the_notes_of_all_stages_are_in_the_summary(tree):
    (Path(tree.runs[0]) / "metrics.jsonl").unlink()
    summary = summarize(read_lineage(tree.runs, None))
    assert len(summary["notes"]) == 1 and "no metrics.jsonl" in summary["notes"][0]
    assert summary["stages"][0]["first_loss"] is None and summary["stages"][0]["tokens_per_second"] is None
