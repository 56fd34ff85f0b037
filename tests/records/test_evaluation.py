"""A result says which state of a model it is of, and those who show it notice another one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_prolong.records.checkpoint.manifest import RunIdentity
from nemo_prolong.records.evaluation import (
    EvaluatedState,
    PerplexityResult,
    RecallResult,
    read_result,
    state_of,
    why_stale,
    write_result,
)
from tests.support.export_tools import make_export_manifest
from tests.support.fake_checkpoint import write_checkpoint

BUCKETS = [{"start": 0, "end": 8, "documents": 1, "tokens": 7, "loss": 1.0, "perplexity": 2.7}]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint of step 100."""
    identity = RunIdentity(name="run", started_at="2026-11-24T14:00:00Z")
    monkeypatch.setattr(RunIdentity, "of", classmethod(lambda cls, run_dir: identity))
    write_checkpoint(tmp_path / "run", 100)
    return tmp_path / "run"


def result_of(model: str) -> PerplexityResult:
    state = state_of(model)
    return PerplexityResult(
        model=model,
        backend="megatron",
        data="rows",
        documents=1,
        buckets=BUCKETS,
        seconds=1.0,
        step=state.step,
        model_sha256=state.sha256,
    )


def test_a_result_is_of_the_checkpoint_that_is_the_newest(run):
    result = result_of(str(run))
    assert result.step == 100 and why_stale(str(run), result) is None
    write_checkpoint(run, 150)
    assert why_stale(str(run), result) == (
        f"{run}: perplexity.json is of step 100, and the model is now at step 150; "
        f"evaluate it again with: python scripts/evaluate.py 'models=[{run}]'"
    )


def test_the_command_that_renews_a_result_can_be_pasted(run):
    result, odd = result_of(str(run)), run.with_name("it's a, run")
    run.rename(odd)
    write_checkpoint(odd, 150)
    *_, typed = shlex.split(why_stale(str(odd), result).partition("with: ")[2])
    assert OverridesParser.create().parse_override(typed).value() == [f"{odd}"]


def test_another_run_in_the_same_place_makes_a_result_stale(run):
    result = result_of(str(run))
    (run / "checkpoints" / "step_00000100" / "manifest.json").write_text("{}")
    assert "perplexity.json is of another state, and the model is now at step 100" in why_stale(str(run), result)


def test_an_export_that_was_overwritten_makes_its_results_stale(tmp_path):
    directory = tmp_path / "hf"
    directory.mkdir()
    make_export_manifest("config.json").write(directory)
    result = result_of(f"hf:{directory}")
    assert result.step is not None and why_stale(f"hf:{directory}", result) is None
    make_export_manifest("config.json", rotary_base=7.0).write(directory)
    assert why_stale(f"hf:{directory}", result) is not None


def test_what_says_nothing_of_its_state_is_never_called_stale(run, tmp_path):
    assert state_of(f"hf:{tmp_path}") == state_of(str(tmp_path)) == EvaluatedState(None, None)
    old = result_of(str(run)).model_copy(update={"step": None, "model_sha256": None})
    assert why_stale(str(run), old) is None
    assert why_stale(str(tmp_path), result_of(str(run))) is None


def test_results_of_an_older_version_are_read(tmp_path):
    recall = {"length": 8, "samples": 1, "exact_match": 0.0, "token_accuracy": 0.0, "answer_loss": 1.0}
    write_result(tmp_path, RecallResult(model="m", backend="megatron", lengths=[recall], seconds=1.0))
    path = tmp_path / "recall.json"
    text = path.read_text().replace(',\n  "step": null,\n  "model_sha256": null', "")
    assert "step" not in text
    path.write_text(text)
    notes: list[str] = []
    found = read_result(path, RecallResult, notes)
    assert found is not None and found.step is None and not notes
