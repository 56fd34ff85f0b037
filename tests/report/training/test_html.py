import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_prolong.records.export_manifest import ExportManifest
from nemo_prolong.report.training.run import write_report
from tests.support.html_page import Page


def report(tree, **changes):
    page, _ = write_report(tree.config(**changes))
    return Page(page.read_text("utf-8"))


def test_the_page_says_what_was_run_and_what_came_out(tree):
    text = report(tree).text
    assert "mini-llama: 512 to 8K tokens of context" in text
    assert "4 stages (base, stage1, stage2, sft)" in text and "18m00s" in text
    for run in tree.runs:
        steps = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        losses = [step["loss"] for step in steps if "loss" in step]
        assert f"{losses[0]:.3f}" in text and f"{losses[-1]:.3f}" in text
        entry = json.loads((Path(run) / "eval" / "perplexity.json").read_text())["buckets"][0]
        assert f"{entry['perplexity']:.1f}" in text or f"{entry['perplexity']:,.0f}" in text
    for fact in ("weights + optimizer", "10,000", "640,000", "code_by_repo-8192", "nemo-toolkit", "2.7.3", "3.1e-06"):
        assert fact in text


def test_the_page_is_made_of_runs_with_steps_that_have_no_loss(tree):
    path = Path(tree.runs[0]) / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    for step in (steps[0], steps[1]):
        step |= {"loss": None, "target_tokens": 0, "loss_by_position": {}, "loss_by_domain": {}}
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    last = [step["loss"] for step in steps if "loss" in step][-1]
    text = report(tree).text
    assert f"{steps[2]['loss']:.2f} \u2192 {last:.2f}" in text
    # An event of the tree says "loss is nan".
    assert not re.search(r"(?<!loss is )\bnan\b", text)
    summary = json.loads((tree.root / "summary.json").read_text())["stages"][0]
    assert summary["first_loss"] is None
    assert summary["target_tokens"] == sum(step.get("target_tokens", 0) for step in steps)


def test_the_commands_are_in_the_order_to_type_them(tree):
    text = report(tree).text
    commands = re.findall(r"python scripts/(\w+)\.py", text)
    assert commands == ["prepare_data"] + ["train"] * 4 + ["export", "evaluate", "evaluate", "report"]
    assert "python scripts/prepare_data.py +exp=data/mini output=" in text
    assert f"python scripts/export.py run={tree.runs[-1]} output={tree.export} dtype=fp32" in text
    assert "max_documents=12 'recall_lengths=[512,1024,2048,4096,8192]' recall_samples=8 seed=42" in text


def test_the_page_loads_nothing_and_runs_nothing(tree):
    page = report(tree)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    html = (tree.root / "report.html").read_text()
    assert "@import" not in html and "url(" not in html


def test_strings_from_the_runs_cannot_become_markup(tree):
    evil = "<script>alert('x')</script>\"&"
    manifest = json.loads((Path(tree.runs[0]) / "stage.json").read_text())
    tree.edit_manifest(
        0,
        stage=evil,
        command=evil,
        git_commit=evil,
        versions={evil: evil},
        model={**manifest["model"], "name": evil},
        data={**manifest["data"], "mixture": [{"path": evil, "proportion": 1.0}]},
    )
    tree.edit_manifest(3, model={**manifest["model"], "name": evil})
    page = report(tree)
    html = (tree.root / "report.html").read_text()
    assert "<script" not in html and "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>\"&") >= 5


def test_missing_evaluations_are_said_with_their_command(tree):
    shutil.rmtree(Path(tree.runs[0]) / "eval")
    text = report(tree).text
    for task in ("perplexity", "recall"):
        note = f"base: no {task} results. Measure them with: python scripts/evaluate.py 'models=[{tree.runs[0]}]'"
        assert note in text
    assert "stage1: no perplexity" not in text


def test_without_evaluations_the_rest_of_the_report_is_there(tree):
    for run in tree.runs:
        shutil.rmtree(Path(run) / "eval")
    text = report(tree, exported=None).text
    assert text.count("no recall results") == 4 and "Training loss" in text and "Recall: exact match" not in text


def test_the_page_says_when_no_model_answers_a_prompt(tree):
    sentence = "None of these models answers a single prompt"
    assert sentence not in report(tree, exported=None).text
    for path in (Path(run) / "eval" / "recall.json" for run in tree.runs):
        result = json.loads(path.read_text())
        for entry in result["lengths"]:
            entry["exact_match"] = 0.0
        path.write_text(json.dumps(result))
    assert sentence in report(tree, exported=None).text


def test_a_cut_metrics_line_is_said_on_the_page(tree):
    path = Path(tree.runs[2]) / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert "1 unreadable line(s) skipped" in report(tree).text


def test_a_run_that_has_only_started_is_reported_as_such(tree):
    tree.edit_manifest(3, status="running", finished_at=None, consumed_train_tokens=0)
    (Path(tree.runs[3]) / "metrics.jsonl").write_text("")
    text = report(tree).text
    assert "status is running" in text and "0 of 20" in text and "of wall time" not in text


def test_missing_config_or_manifest_leaves_dashes(tree):
    (Path(tree.runs[1]) / "config.json").unlink()
    (tree.root / "data" / "manifest.json").unlink()
    text = report(tree).text
    assert "code_by_repo-2048 \u2013 30% \u2013 \u2013 \u2013" in text


def test_an_export_that_was_not_verified_says_so(tree):
    directory = Path(tree.export)
    ExportManifest.read(directory).model_copy(update={"verification": None}).write(directory)
    assert "not verified" in report(tree).text


def test_a_single_stage_is_not_said_to_extend_anything(tree):
    assert "mini-llama: 2K tokens of context" in report(tree, runs=tree.runs[-1:], exported=None).text


@pytest.mark.parametrize("number", [1, 3])
def test_any_chain_of_stages_makes_a_report(tree, number):
    text = report(tree, runs=tree.runs[-number:], exported=None).text
    assert f"{number} stage{'s' if number > 1 else ''} (" in text


def test_the_report_is_written_without_importing_torch(tree):
    code = (
        "import sys; from nemo_prolong.config.schema import ReportConfig;"
        "from nemo_prolong.report.training.run import write_report;"
        f"cfg = ReportConfig(runs={tree.runs!r}, exported=None, output={str(tree.root / 'out' / 'r.html')!r});"
        "print(*write_report(cfg));"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(tree.root / "out" / "r.html"), str(tree.root / "out" / "summary.json")]
    assert sorted(path.name for path in (tree.root / "out").iterdir()) == ["r.html", "summary.json"]
