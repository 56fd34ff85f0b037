"""What a data manifest says of a row set, and when its reader is told of what packing has lost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nemo_prolong.records.data_manifest import DataManifest, Rejection, RowSetFacts, losses


def facts(**changed: Any) -> RowSetFacts:
    """Return 10 rows of 100 tokens, of which packing lost nothing but what is given."""
    values: dict[str, Any] = {
        "domain": "chat",
        "split": "train",
        "packing": "intact",
        "seq_length": 100,
        "rows": 10,
        "documents": 30,
        "tokens": 980,
        "fill": 0.98,
        "input_documents": 1500,
        "input_tokens": 1000,
        "sum_squared_lengths": 50_000,
        "sha256": "00",
    }
    return RowSetFacts(**{**values, **changed})


def test_shares_are_of_rows_and_of_tokens() -> None:
    found = facts(target_tokens=245)
    assert (found.attention_share, found.tokens_per_row, found.target_share) == (0.5, 98.0, 0.25)
    assert facts().target_share is None


def test_what_is_beyond_the_rows_asked_for_is_not_dropped() -> None:
    assert facts().dropped_share == 0.0
    assert facts(dropped_tokens={"last_row": 100}).dropped_share == 0.1
    assert facts(dropped_tokens={"last_row": 100, "max_rows": 600}).dropped_share == 0.25
    # Everything is beyond.
    assert facts(dropped_tokens={"last_row": 0, "max_rows": 1000}).dropped_share == 0.0
    assert facts(dropped_tokens={"last_row": 1, "max_rows": 999}).dropped_share == 1.0


def test_nothing_is_said_of_rows_that_lost_little() -> None:
    assert losses(facts()) == []
    at_the_bounds = facts(dropped_tokens={"last_row": 500}, target_tokens=75, cut_target_tokens=25)
    assert losses(at_the_bounds) == []
    assert losses(facts(target_tokens=0, cut_target_tokens=0)) == []


def test_documents_that_are_left_without_a_target_are_said() -> None:
    assert losses(facts(dropped_documents={"no_target": 1234, "last_row": 5})) == [
        "packing leaves 1,234 of 1,500 documents no target token, so they are left out. Longer rows keep them."
    ]


def test_targets_that_the_ends_of_rows_cut_off_are_said() -> None:
    (said,) = losses(facts(target_tokens=4000, cut_target_tokens=1334))
    assert said == (
        "the ends of rows cut off 1,334 target tokens of documents that are in rows, and 4,000 are left. "
        "Longer rows cut fewer."
    )
    # A manifest that counts only what was cut.
    (said,) = losses(facts(cut_target_tokens=1))
    assert "cut off 1 target tokens of documents that are in rows, and 0 are left" in said


def test_the_worst_reason_is_one_that_nobody_asked_for() -> None:
    (said,) = losses(facts(input_tokens=2000, dropped_tokens={"max_rows": 900, "truncated": 300, "last_row": 400}))
    assert said == "64% of the tokens are in no row, most of them because of last_row."


def test_rejections_are_added() -> None:
    assert Rejection(documents=2, bytes=30) + Rejection(documents=1, bytes=4) == Rejection(documents=3, bytes=34)


def test_a_stage_takes_rows_that_the_manifest_has() -> None:
    taken = {"proportion": 1.0, "rows_taken": 1, "epochs": 1.0}
    manifest = {
        "format": 2,
        "seed": 0,
        "tokenizer": "t",
        "tokenizer_sha256": "00",
        "tokenizer_library": "tokenizers",
        "vocab_size": 9,
        "sources": [],
        "domains": {},
        "row_sets": {"rows": facts().model_dump()},
        "stages": {"sft": {"tokens": 1, "row_sets": {"rows": taken, "b": taken, "a": taken}}},
    }
    with pytest.raises(ValidationError, match="stage sft takes rows of a, b, which row_sets does not hold"):
        DataManifest.model_validate(manifest)


def test_facts_are_of_at_least_one_row_and_token() -> None:
    smallest = facts(seq_length=1, rows=1, tokens=1)
    assert (smallest.seq_length, smallest.rows, smallest.tokens) == (1, 1, 1)
    for field in ("seq_length", "rows", "tokens"):
        with pytest.raises(ValidationError, match=f"{field}\n  Input should be greater than 0"):
            facts(**{field: 0})


def test_facts_that_were_read_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        facts().rows = 5  # type: ignore[misc]
