"""Results of an evaluation as they are written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemo_prolong.records.evaluation import (
    Bucket,
    EvaluatedState,
    PerplexityResult,
    RecallEntry,
    RecallResult,
    evaluation_directory,
    read_result,
    state_of,
    write_result,
)

PERPLEXITY: dict[str, Any] = {
    "task": "perplexity",
    "model": "runs/a",
    "through": "megatron",
    "data": "data/rows",
    "documents": 2,
    "buckets": [{"start": 0, "end": 512, "documents": 2, "tokens": 9, "loss": 1.0, "perplexity": 2.7}],
    "seconds": 1.5,
    "settings": {"rows": 4},
    "step": 100,
    "model_sha256": "00",
}
RECALL: dict[str, Any] = {
    "task": "recall",
    "model": "hf:a",
    "through": "transformers",
    "lengths": [
        {
            "length": 512,
            "samples": 8,
            "exact_match": 0.5,
            "token_accuracy": 0.6,
            "answer_loss": 1.0,
            "chance_loss": 4.0,
            "answer_tokens": 16,
        }
    ],
    "seconds": 2.5,
    "settings": {},
    "step": None,
    "model_sha256": "11",
}


def test_a_run_without_a_checkpoint_is_in_no_state(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    assert state_of(str(tmp_path / "run")) == state_of(str(tmp_path / "none")) == EvaluatedState()


def test_results_of_a_run_lie_in_it_and_of_a_directory_beside_it() -> None:
    assert evaluation_directory("runs/demo/sft") == Path("runs/demo/sft/eval")
    assert evaluation_directory("hf:exports/llama") == Path("exports/llama_eval")


@pytest.mark.parametrize(("kind", "content"), [(PerplexityResult, PERPLEXITY), (RecallResult, RECALL)])
def test_a_result_is_written_key_by_key_as_it_is_read(kind: Any, content: dict[str, Any], tmp_path: Path) -> None:
    result = kind.model_validate(content)
    write_result(tmp_path, result)
    path = tmp_path / f"{content['task']}.json"
    assert json.loads(path.read_text()) == content
    notes: list[str] = []
    assert read_result(path, kind, notes) == result and notes == []


def test_results_of_earlier_versions_lack_some_keys(tmp_path: Path) -> None:
    keys = ("length", "samples", "exact_match", "token_accuracy", "answer_loss")
    entry = {key: RECALL["lengths"][0][key] for key in keys}
    old = {"model": "a", "through": "megatron", "lengths": [entry], "seconds": 1.0, "of a later version": 1}
    (tmp_path / "recall.json").write_text(json.dumps(old))
    result = read_result(tmp_path / "recall.json", RecallResult, [])
    assert result is not None and result.settings == {} and result.task == "recall"
    assert (result.lengths[0].chance_loss, result.lengths[0].answer_tokens) == (None, None)
    bare = {key: value for key, value in PERPLEXITY.items() if key not in ("task", "settings")}
    perplexity = PerplexityResult.model_validate(bare)
    assert perplexity.settings == {} and perplexity.task == "perplexity"


def test_a_result_is_made_by_the_names_of_its_fields() -> None:
    entry = RecallEntry(length=1, samples=1, exact_match=0.0, token_accuracy=0.0, answer_loss=0.0)
    result = RecallResult(model="a", backend="megatron", lengths=[entry], seconds=1.0)
    assert result.model_dump()["through"] == "megatron"
    assert Bucket(start=3, end=5, documents=0, tokens=0, loss=None, perplexity=None).span == (3, 5)


@pytest.mark.parametrize(("kind", "content"), [(PerplexityResult, PERPLEXITY), (RecallResult, RECALL)])
def test_a_result_has_no_other_keys_and_does_not_change(kind: Any, content: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        kind.model_validate({**content, "more": 1})
    with pytest.raises(ValidationError, match="frozen"):
        kind.model_validate(content).model = "b"
    with pytest.raises(ValidationError, match="at least 1 item"):
        kind.model_validate({**content, "buckets" if kind is PerplexityResult else "lengths": []})
    with pytest.raises(ValidationError, match="Input should be"):
        kind.model_validate({**content, "task": "another"})


def test_a_result_that_is_not_there_is_none_without_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    assert read_result(tmp_path / "recall.json", RecallResult, notes) is None and notes == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "Expecting property name"), (b"\xff", "'utf-8' codec"), (b"{}", "4 validation errors")],
)
def test_a_result_that_cannot_be_read_is_said(content: bytes, reason: str, tmp_path: Path) -> None:
    path, notes = tmp_path / "recall.json", list[str]()
    path.write_bytes(content)
    assert read_result(path, RecallResult, notes) is None
    (note,) = notes
    assert note.startswith(f"{path}: left out, it is not readable ({reason}") and note.endswith(").")
    assert "\n" not in note
