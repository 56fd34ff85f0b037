"""An exported directory is the same model in both major versions of transformers: numbers equal to the last bit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.what_transformers_makes import record

EXPORTS = Path(os.environ["INTEROP_EXPORTS"])


@pytest.fixture(scope="module", params=["untied", "tied", "scaled"])
def both(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the environment that wrote the export and this one make of it."""
    return json.loads((EXPORTS / f"{request.param}.json").read_text()), record(EXPORTS / request.param)


def test_the_environments_hold_both_major_versions(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert both[1]["transformers"] == transformers.__version__
    assert sorted(int(found["transformers"].split(".")[0]) for found in both) == [4, 5]


@pytest.mark.parametrize("what", ["context_length", "inv_freq", "stop_ids", "tied"])
def test_the_configuration_is_read_as_the_same(both: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    theirs, ours = both
    assert ours[what] == theirs[what]


@pytest.mark.parametrize("what", ["logits", "spread_logits", "greedy"])
def test_the_model_computes_the_same(both: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    theirs, ours = both
    assert ours[what] == theirs[what]


@pytest.mark.parametrize("what", ["chat", "text"])
def test_the_tokenizer_cuts_the_same(both: tuple[dict[str, Any], dict[str, Any]], what: str) -> None:
    theirs, ours = both
    assert ours[what] == theirs[what]
