import json
import math
from pathlib import Path

import pytest

from nemo_prolong.errors import CheckpointError, ExportError
from nemo_prolong.report.training.read import read_lineage, read_metrics
from tests.support.fake_checkpoint import write_checkpoint


def test_every_stage_is_read_with_all_its_records(tree):
    lineage = read_lineage(tree.runs, tree.export)
    assert [stage.label for stage in lineage.stages] == ["base", "stage1", "stage2", "sft"]
    assert [len(stage.steps) for stage in lineage.stages] == [200, 60, 30, 20]
    assert [v.step for v in lineage.stages[0].validations] == [50, 100, 150, 200]
    assert all(model.perplexity and model.recall for model in lineage.evaluated)
    assert lineage.evaluated[-1].model == f"hf:{tree.export}"
    assert lineage.export.max_logit_difference == 3.1e-06
    assert not any(stage.notes for stage in lineage.stages)


def test_an_evaluation_of_an_earlier_checkpoint_is_said(tree):
    run = Path(tree.runs[1])
    path = run / "eval" / "perplexity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 30, "model_sha256": "0" * 64}))
    write_checkpoint(run, 60)
    notes = read_lineage(tree.runs, None).stages[1].notes
    assert notes == [
        f"{run}: perplexity.json is of step 30, and the model is now at step 60; "
        f"evaluate it again with: python scripts/evaluate.py 'models=[{run}]'."
    ]


def test_two_runs_of_one_stage_are_told_apart_by_their_names(tree):
    tree.edit_manifest(2, stage="stage1", name="demo/other")
    labels = [stage.label for stage in read_lineage(tree.runs, None).stages]
    assert labels == ["base", "demo/stage1", "demo/other", "sft"]


def test_a_cut_last_line_is_skipped_and_said(tree):
    path = Path(tree.runs[1]) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 61, "lo')
    stage = read_lineage(tree.runs, None).stages[1]
    assert stage.steps[-1].step == 60
    assert stage.notes == [f"{path}: 1 unreadable line(s) skipped; a run that is killed may leave one."]


def test_the_last_record_of_a_repeated_step_counts(tmp_path):
    def line(step, loss):
        record = {
            "step": step,
            "loss": loss,
            "real_tokens": 10,
            "consumed_train_tokens": 10 * step,
            "step_seconds": 1.0,
        }
        return json.dumps(record) + "\n"

    path = tmp_path / "metrics.jsonl"
    # Killed while writing step 3, resumed from step 1: the cut line and the next record share a line.
    path.write_text(line(1, 5.0) + line(2, 4.0) + '{"step": 3, "loss": 3' + line(2, 4.5) + line(2, 4.25) + line(3, 3.5))
    notes = []
    steps, _ = read_metrics(path, notes)
    assert [(step.step, step.loss) for step in steps] == [(1, 5.0), (2, 4.25), (3, 3.5)]
    assert len(notes) == 1 and "1 unreadable line(s)" in notes[0]


@pytest.mark.parametrize("line", ["[1, 2]", "null", '{"step": 1}', '{"step": "x", "val_loss": 1}', "\x00\x00"])
def test_a_line_that_is_no_record_is_skipped_whatever_it_holds(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    notes = []
    assert read_metrics(path, notes) == ([], [])
    assert "1 unreadable line(s)" in notes[0]


def test_a_run_without_metrics_has_a_note_instead_of_steps(tree):
    (Path(tree.runs[3]) / "metrics.jsonl").unlink()
    stage = read_lineage(tree.runs, None).stages[3]
    assert stage.steps == [] and stage.notes == [
        f"{tree.runs[3]}: there is no metrics.jsonl, so no loss and no throughput."
    ]


def test_a_run_that_is_not_finished_says_so(tree):
    tree.edit_manifest(3, status="running", finished_at=None, consumed_train_tokens=0)
    stage = read_lineage(tree.runs, None).stages[3]
    assert stage.wall_seconds is None
    assert stage.tokens_trained == stage.steps[-1].consumed_train_tokens > 0
    assert stage.notes == [f"{tree.runs[3]}: status is running; figures show what was recorded so far."]


def test_a_directory_that_is_no_run_is_refused(tree, tmp_path):
    with pytest.raises(CheckpointError, match=r"empty: .*stage\.json"):
        read_lineage([*tree.runs, str(tmp_path / "empty")], None)


def test_a_directory_that_is_no_export_is_refused(tree, tmp_path):
    with pytest.raises(ExportError, match=r"exported=.*no readable export_manifest\.json.*set exported=null"):
        read_lineage(tree.runs, str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"through": "megatron", "lengths": []}', '{"lengths": [{"length": 1}]}'])
def test_an_unreadable_evaluation_counts_as_missing(tree, text):
    path = Path(tree.runs[0]) / "eval" / "recall.json"
    path.write_text(text)
    stage = read_lineage(tree.runs, None).stages[0]
    assert stage.evaluated.recall is None and stage.evaluated.perplexity is not None
    assert len(stage.notes) == 1 and stage.notes[0].startswith(f"{path}: left out, it is not readable")


def test_a_loss_of_nan_is_read_as_nan(tmp_path):
    record = {"step": 1, "loss": math.nan, "real_tokens": 1, "consumed_train_tokens": 1, "step_seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record))
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl", [])[0][0].loss)
