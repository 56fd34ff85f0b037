"""All readers of a stored row take the same for granted: what one refuses none accepts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.dataset import RowFormat, ValidationRowDataset, build_row
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.data.samples import sample_row
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.data.stored_row import StoredRow
from nemo_prolong.data.verify import verify
from nemo_prolong.errors import DataError
from nemo_prolong.evaluate.perplexity import split_documents
from nemo_prolong.report.terminal.row_sets import describe
from nemo_prolong.report.terminal.rows import RowView
from tests.support.stored_rows import TOKENIZER
from tests.support.terminal import printed

ENCODINGS = {
    "input_ids": "ndarray:uint32",
    "indices": "ndarray:uint32",
    "mask": "ndarray:uint8",
    "length": "int",
    "domain": "str",
}
WHOLE: dict[str, Any] = {
    "input_ids": np.arange(6, dtype=np.uint32),
    "indices": np.array([[0, 2], [2, 6]], np.uint32),
    "mask": np.array([0, 1, 0, 1, 1, 0], np.uint8),
    "length": 6,
    "domain": "docs",
}
FAULTY: list[tuple[dict[str, Any], str]] = [
    (
        {"input_ids": np.ones((2, 3), np.uint32)},
        "has input_ids of shape [2, 3] and type uint32, not integers [tokens].",
    ),
    (
        {"indices": np.array([[0, 2], [3, 6]], np.uint32)},
        "has span 1 from 3 to 6, which leaves tokens from 2 to 3 to no",
    ),
    ({"indices": np.array([[0, 5]], np.uint32)}, "has no span for its tokens from 5 to 6."),
    ({"indices": np.array([0, 6], np.uint32)}, "has spans of shape [2] and type uint32, not integers [documents, 2]."),
    ({"mask": np.ones(5, np.uint8)}, "has a mask of shape [5] for 6 tokens."),
    ({"mask": np.full(6, 200, np.uint8)}, "has 200 in its mask, which is of 0 and 1."),
    ({"length": 7}, "says length=7 and has 6 tokens."),
]


def write(directory: Path, row: dict[str, Any]) -> Path:
    with MdsWriter(directory, {name: ENCODINGS[name] for name in row}) as writer:
        writer.write(row)
    return directory


def prepared(directory: Path) -> list[list[int]]:
    """Return the documents that a preparation makes of the rows."""
    source = SourceConfig(domain="d", path=str(directory), format="packed_mds")
    items = [item for unit in plan_units(source, None, 2**20) for item in read_unit(source, unit, None)]
    return [item.input_ids.tolist() for item in items]


def trained(directory: Path) -> list[list[int]]:
    """Return the documents that training sees."""
    row = ValidationRowDataset(directory.parent, [directory.name], 6)[0]
    edges = row.cu_seqlens.tolist()
    return [row.tokens[start:end].tolist() for start, end in itertools.pairwise(edges)]


def evaluated(directory: Path) -> list[list[int]]:
    """Return the documents that an evaluation scores."""
    return [tokens.tolist() for tokens in split_documents([MdsReader(directory)[0]], 100)]


def sampled(directory: Path) -> list[list[int]]:
    """Return the documents of the sample in samples.json."""
    row = MdsReader(directory)[0]
    return [row["input_ids"][start:end].tolist() for start, end in sample_row(row, 0, TOKENIZER)["spans"]]


READERS = [prepared, trained, evaluated, sampled]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("absent", [(), ("indices",), ("mask", "domain"), ("length",), ("indices", "length", "domain")])
def test_every_reader_finds_the_same_documents_in_a_row(tmp_path, reader, absent):
    directory = write(tmp_path / "rows", {name: value for name, value in WHOLE.items() if name not in absent})
    expected = [[0, 1, 2, 3, 4, 5]] if "indices" in absent else [[0, 1], [2, 3, 4, 5]]
    assert reader(directory) == expected
    assert not [finding for finding in verify(directory) if isinstance(finding, DataError)]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("change", "rule"), FAULTY)
def test_every_reader_refuses_a_faulty_row_in_the_same_words(tmp_path, reader, change, rule):
    directory = write(tmp_path / "rows", {**WHOLE, **change})
    with pytest.raises(DataError) as caught:
        reader(directory)
    assert rule in str(caught.value) and "row 0" in str(caught.value)


@pytest.mark.parametrize(("change", "rule"), FAULTY)
def test_inspection_and_verification_say_what_training_refuses(tmp_path, change, rule):
    directory = write(tmp_path / "rows", {**WHOLE, **change})
    (error,) = [finding for finding in verify(directory) if isinstance(finding, DataError)]
    assert f"{directory} row 0: {rule}" in str(error)
    if "input_ids" not in change:
        assert f"the row {rule.rstrip('.')}" in printed(*describe(directory, ["0"], RowView()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 7), st.integers(-1, 7)), max_size=4), st.integers(1, 6))
def test_spans_pass_where_they_hold_every_token_once(spans, num_tokens):
    held = [token for start, stop in spans for token in range(start, stop)]
    tiles = held == list(range(num_tokens)) and all(start < stop for start, stop in spans)
    row = StoredRow.of({"input_ids": np.arange(num_tokens), "indices": np.array(spans, np.int64).reshape(-1, 2)})
    assert (not row.faults) == tiles
    if tiles:
        assert row.spans.tolist() == [list(span) for span in spans]
        assert row.bounds.tolist() == [0, *(stop for _, stop in spans)]
    else:
        assert [fault.reason for fault in row.faults] == ["bad_spans"]


@pytest.mark.parametrize("reader", [trained, evaluated, sampled])
def test_a_column_that_only_preparation_follows_is_refused_elsewhere(tmp_path, reader):
    labels = np.array([-100, 1, 2, 3, 4, 5], np.int32)
    row = {"input_ids": np.arange(6, dtype=np.int32), "labels": labels}
    with MdsWriter(tmp_path / "rows", dict.fromkeys(row, "ndarray:int32")) as writer:
        writer.write(row)
    with pytest.raises(DataError, match=r"row 0: has a column labels, .* Pack the rows again \(format=packed_mds\)"):
        reader(tmp_path / "rows")
    assert prepared(tmp_path / "rows") == [[0, 1, 2, 3, 4, 5]]


def test_an_attention_mask_of_ones_says_nothing():
    row = {"input_ids": np.arange(3), "attention_mask": np.ones(3, np.int64)}
    assert not StoredRow.of(row).faults
    (fault,) = StoredRow.of({**row, "attention_mask": np.array([1, 1, 0])}).faults
    assert fault.rule.startswith("has a column attention_mask")


def test_a_row_without_a_mask_trains_on_every_token():
    row = build_row({"input_ids": np.arange(4)}, RowFormat(4), "row")
    assert row.loss_mask.tolist() == [1.0, 1.0, 1.0, 0.0] and row.domain == ""
