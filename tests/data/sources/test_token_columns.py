"""Token ids with columns about them: what they say is followed, and what contradicts itself is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.data.sources.base import Unread
from nemo_prolong.data.sources.token_columns import tokens_of
from nemo_prolong.errors import DataError

IDS = [5, 6, 7, 8]


@pytest.fixture(params=["jsonl", "parquet", "tokenized_mds"])
def tokens(request, tmp_path, read):
    """A function from a row to what is read of it, in every format that holds tokens."""

    def read_row(row: dict[str, Any], **settings: Any) -> Any:
        path = tmp_path / request.param
        if request.param == "tokenized_mds":
            columns = {name: "ndarray:int64" if isinstance(value, list) else "int" for name, value in row.items()}
            with MdsWriter(path, columns) as writer:
                writer.write({n: np.array(v, np.int64) if isinstance(v, list) else v for n, v in row.items()})
            return read(path, format=request.param, **settings)
        path.mkdir()
        if request.param == "jsonl":
            (path / "a.jsonl").write_text(json.dumps(row))
        else:
            pq.write_table(pa.Table.from_pylist([row]), path / "a.parquet")
        return read(path, format=request.param, tokens_field="input_ids", **settings)

    return read_row


@pytest.mark.parametrize(
    ("beside", "ids", "mask"),
    [
        ({}, IDS, None),
        ({"labels": [-100, -100, 7, 8]}, IDS, [0, 0, 1, 1]),
        ({"loss_mask": [0, 1, 1, 0]}, IDS, [0, 1, 1, 0]),
        ({"mask": [0, 1, 1, 0], "labels": [-100, 6, 7, -100]}, IDS, [0, 1, 1, 0]),
        ({"completion_mask": [0, 0, 1, 1]}, IDS, [0, 0, 1, 1]),
        ({"assistant_masks": [0, 0, 1, 1]}, IDS, [0, 0, 1, 1]),
        ({"attention_mask": [1, 1, 1, 1]}, IDS, None),
        ({"attention_mask": [0, 1, 1, 0], "labels": [-100, 6, -100, -100]}, [6, 7], [1, 0]),
        ({"attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2], "length": 3}, [6, 7, 8], None),
        ({"position_ids": [0, 1, 2, 3], "length": 4, "seq_lengths": [4], "cu_seqlens": [0, 4]}, IDS, None),
    ],
)
def test_columns_beside_tokens_are_followed(tokens, beside, ids, mask):
    (document,) = tokens({"input_ids": IDS, **beside}).documents
    assert document.input_ids.tolist() == ids
    assert (None if document.mask is None else document.mask.tolist()) == mask
    assert document.whole


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"labels": [6, 7, 8, -100]}, "has the label 6 at token 0, which is 5."),
        ({"labels": [-100, 6]}, "has labels of shape [2] and type int64 for 4 tokens."),
        ({"loss_mask": [0, 2, 1, 1]}, "has 2 in its loss_mask, which is of 0 and 1."),
        ({"loss_mask": [1, 1, 1, 0], "labels": [5, 6, 7, 8]}, "has loss_mask and labels that differ at token 3"),
        ({"attention_mask": [1, 0, 1, 1]}, "has tokens within it that its attention_mask hides."),
        ({"attention_mask": [0, 0, 0, 0]}, "has no token but padding, by its attention_mask."),
        ({"attention_mask": [1, 1, 2, 2]}, "has 2 in its attention_mask, which is of 0 and 1."),
        ({"position_ids": [0, 1, 0, 1]}, "has position_ids that do not count every document from 0, and 1 are read."),
        ({"seq_lengths": [2, 2]}, "holds other documents by its seq_lengths than the 1 that are read."),
        ({"cu_seqlens": [0, 2, 4]}, "holds other documents by its cu_seqlens than the 1 that are read."),
        ({"length": 5}, "says length=5 and has 4 tokens."),
    ],
)
def test_columns_that_contradict_the_tokens_are_refused(tokens, beside, said):
    with pytest.raises(DataError) as caught:
        tokens({"input_ids": IDS, **beside})
    assert said in caught.value.rule


def test_columns_to_ignore_are_not_followed(tokens):
    (document,) = tokens({"input_ids": IDS, "labels": [6, 7, 8, 9]}, ignore_fields=["labels"]).documents
    assert document.mask is None


@given(
    ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=20),
    targets=st.lists(st.booleans(), min_size=20, max_size=20),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_padding_is_cut_off_and_the_mask_stays_with_its_tokens(ids, targets, left, right):
    wanted = targets[: len(ids)]
    labels = [token if target else -100 for token, target in zip(ids, wanted, strict=True)]
    found, mask = tokens_of(
        [0] * left + ids + [0] * right,
        {
            "labels": [-100] * left + labels + [-100] * right,
            "attention_mask": [0] * left + [1] * len(ids) + [0] * right,
        },
    )
    assert (found.tolist(), mask.tolist()) == (ids, [int(target) for target in wanted])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "has no token in its input_ids."),
        ([1.5], "has input_ids of shape [1] and type float64"),
        ([1, None], "has input_ids of shape [2] and type object"),
        ("text", "has input_ids of shape [] and type <U4"),
    ],
)
def test_what_is_no_list_of_tokens_is_refused(tmp_path, read, ids, said):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": ids}))
    with pytest.raises(DataError) as caught:
        read(tmp_path, format="jsonl", tokens_field="input_ids")
    assert said in caught.value.rule


@pytest.mark.parametrize("kind", [pa.int16(), pa.int32(), pa.uint32(), pa.int64()])
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)])
def test_token_columns_of_any_list_are_read(tmp_path, read, kind, list_of):
    pq.write_table(pa.table({"tokens": pa.array([[1, 2, 3], [4, 5, 6]], list_of(kind))}), tmp_path / "a.parquet")
    found = read(tmp_path, format="parquet", tokens_field="tokens")
    assert [document.input_ids.tolist() for document in found.documents] == [[1, 2, 3], [4, 5, 6]]


def test_rows_of_a_table_without_tokens_are_bad(tmp_path, read):
    pq.write_table(pa.table({"tokens": [[1, 2, 3], None, [4, None], [4, 5, 6], []]}), tmp_path / "a.parquet")
    found = read(tmp_path, format="parquet", tokens_field="tokens", on_bad_document="drop")
    assert [document.input_ids.tolist() for document in found.documents] == [[1, 2, 3], [4, 5, 6]]
    assert [rejected.reason for rejected in found.rejected] == ["wrong_type", "wrong_type", "empty_document"]


def test_a_table_of_tokens_says_how_to_name_them(tmp_path, read):
    pq.write_table(pa.table({"text": [[1, 2]], "input_ids": [[1, 2]], "word": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"has list<.*> in its column 'text', not text\. For token ids set tokens_field=text"
    ):
        read(tmp_path, format="parquet")
    with pytest.raises(DataError, match=r"has string in its column 'word', not lists of token ids\."):
        read(tmp_path, format="parquet", tokens_field="word")


def write_packed(directory, **beside):
    spans = np.array([[0, 1], [1, 4]], np.uint32)
    row = {"input_ids": np.array(IDS, np.uint32), "indices": spans, **{n: np.array(v) for n, v in beside.items()}}
    columns = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", **dict.fromkeys(beside, "ndarray:int64")}
    with MdsWriter(directory, columns) as writer:
        writer.write(row)
    return directory


def test_a_packed_row_is_not_read_as_one_document(tmp_path, read):
    path = write_packed(tmp_path / "d")
    with pytest.raises(DataError) as caught:
        read(path, format="tokenized_mds")
    assert caught.value.rule == "holds 2 documents by its indices, and is read as one."
    assert caught.value.remedy.startswith("Set format=packed_mds, or ignore_fields=[indices].")
    (document,) = read(path, format="tokenized_mds", ignore_fields=["indices"]).documents
    assert document.input_ids.tolist() == IDS


def test_columns_of_packed_rows_are_followed(tmp_path, read):
    beside = {
        "labels": [5, -100, 7, 8],
        "position_ids": [0, 0, 1, 2],
        "attention_mask": [1] * 4,
        "cu_seqlens": [0, 1, 4],
    }
    found = read(write_packed(tmp_path / "d", **beside), format="packed_mds").documents
    assert [document.mask.tolist() for document in found] == [[1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"labels": [5, 7, 8, -100]}, "has the label 7 at token 1, which is 6."),
        ({"position_ids": [0, 1, 2, 3]}, "has position_ids that do not count every document from 0, and 2 are read."),
        ({"attention_mask": [1, 1, 1, 0]}, "has padding in a packed row, by its attention_mask."),
        ({"cu_seqlens": [0, 2, 4]}, "holds other documents by its cu_seqlens than the 2 that are read."),
    ],
)
def test_columns_that_contradict_a_packed_row_are_refused(tmp_path, read, beside, said):
    with pytest.raises(DataError) as caught:
        read(write_packed(tmp_path / "d", **beside), format="packed_mds")
    assert caught.value.rule == said


def test_columns_of_rows_that_nobody_reads_are_counted(tmp_path):
    path = write_packed(tmp_path / "d", labels=[6, 7, 8, 9], quality=[1, 2, 3, 4])
    source = SourceConfig(domain="d", path=str(path), format="packed_mds", ignore_fields=["labels"])
    unread = Unread()
    for unit in plan_units(source):
        list(read_unit(source, unit, None, unread))
    assert unread.columns == {"labels": 1, "quality": 1}
