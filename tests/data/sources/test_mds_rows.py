"""Tokens made before: rows and spans of MDS directories, and what is said of those that contradict themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.sources import plan_units
from nemo_prolong.errors import DataError

_PACKED = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str"}


def _write(
    directory: Path, columns: dict[str, str], rows: list[dict[str, Any]], shard_bytes: int = 2**20, **options: Any
) -> Path:
    with MdsWriter(directory, columns, shard_bytes, **options) as writer:
        for row in rows:
            writer.write(row)
    return directory


def _packed_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": np.arange(10, dtype=np.uint32) + 100 * number,
            "indices": np.array([[0, 4], [4, 5], [5, 10]], np.uint32),
            "domain": "books",
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("encoding", ["ndarray:int32", "ndarray:uint32", "ndarray:int64", "ndarray:uint16", "ndarray"])
@pytest.mark.parametrize(("unit_bytes", "shard_bytes"), [(1, 300), (1, 2**20), (400, 300), (400, 2**20), (2**20, 300)])
def test_rows_are_documents_in_units_of_any_size(tmp_path, read, encoding, unit_bytes, shard_bytes):
    kind = encoding.partition(":")[2] or "int16"
    rows = [
        {"input_ids": np.arange(number + 1).astype(kind), "domain": "x", "length": number + 1} for number in range(20)
    ]
    columns = {"input_ids": encoding, "domain": "str", "length": "int"}
    _write(tmp_path / "books", columns, rows, shard_bytes)
    found = read(tmp_path / "books", unit_bytes=unit_bytes, format="tokenized_mds")
    assert [document.input_ids.tolist() for document in found.documents] == [list(range(n + 1)) for n in range(20)]
    assert [(d.key, d.group) for d in found.documents] == [(f"books row {n}", f"books row {n}") for n in range(20)]
    assert all(document.whole and document.mask is None for document in found.documents)


def test_every_shard_starts_at_its_first_row_and_is_named(tmp_path):
    directory = _write(tmp_path / "d", _PACKED, _packed_rows(30), 600)
    source = SourceConfig(domain="d", path=str(directory), format="packed_mds")
    for unit_bytes in (1, 250, 700, 2**20):
        units = plan_units(source, None, unit_bytes)
        begun = [file.name for unit in units if unit.start == 0 for file in unit.files]
        assert begun == sorted(file.name for file in directory.glob("*.mds"))
        assert sum(unit.num_bytes for unit in units) == pytest.approx(
            sum(file.stat().st_size for file in directory.glob("*.mds")), abs=len(units)
        )


@pytest.mark.parametrize("unit_bytes", [1, 300, 2**20])
def test_spans_of_packed_rows_are_documents(tmp_path, read, unit_bytes):
    _write(
        tmp_path / "d",
        {**_PACKED, "mask": "ndarray:uint8"},
        [{**r, "mask": np.ones(10, np.uint8)} for r in _packed_rows(7)],
    )
    found = read(tmp_path / "d", unit_bytes=unit_bytes, format="packed_mds")
    assert len(found.documents) == 21
    assert [d.key for d in found.documents[3:6]] == ["d row 1 span 0", "d row 1 span 1", "d row 1 span 2"]
    assert [d.input_ids.tolist() for d in found.documents[3:6]] == [
        [100, 101, 102, 103],
        [104],
        [105, 106, 107, 108, 109],
    ]
    assert all(not d.whole and d.mask is not None and len(d.mask) == len(d.input_ids) for d in found.documents)


def test_a_packed_row_without_spans_is_one_document(tmp_path, read):
    _write(tmp_path / "d", {"input_ids": "ndarray:uint32"}, [{"input_ids": np.arange(5, dtype=np.uint32)}])
    (document,) = read(tmp_path / "d", format="packed_mds").documents
    assert (document.key, document.input_ids.tolist(), document.whole) == ("d row 0", [0, 1, 2, 3, 4], False)


def test_compressed_and_nested_shards_are_read_and_named(tmp_path, read):
    rows = _packed_rows(8)
    for number in range(2):
        _write(tmp_path / "d" / f"part-{number}", _PACKED, rows[4 * number :][:4], 300, compression="zstd")
    found = read(tmp_path / "d", unit_bytes=1, cache=tmp_path / "cache", format="packed_mds")
    assert [d.input_ids[0] for d in found.documents[::3]] == [100 * number for number in range(8)]


def test_groups_come_from_a_column(tmp_path, read):
    columns = {"input_ids": "ndarray:uint32", "book": "str"}
    rows = [{"input_ids": np.array([1], np.uint32), "book": book} for book in "ab"]
    _write(tmp_path / "d", columns, rows)
    assert [d.group for d in read(tmp_path / "d", format="tokenized_mds", group_field="book").documents] == ["a", "b"]
    with pytest.raises(DataError, match="has no column site"):
        read(tmp_path / "d", format="tokenized_mds", group_field="site")


@pytest.mark.parametrize(
    ("row", "reason", "said"),
    [
        ({"length": 4}, "wrong_length", "says length=4 and has 3 tokens."),
        ({"mask": [1, 1]}, "bad_mask", "has a mask of shape [2] for 3 tokens."),
        ({"mask": [0, 200, 1]}, "bad_mask", "has 200 in its mask, which is of 0 and 1."),
        ({"input_ids": [[1, 2, 3]]}, "wrong_type", "has input_ids of shape [1, 3] and type uint32"),
    ],
)
def test_a_bad_row_is_refused_by_number_or_dropped(tmp_path, read, row, reason, said):
    columns = {"input_ids": "ndarray:uint32", "length": "int", "mask": "ndarray:uint8"}
    good = {"input_ids": [1, 2, 3], "length": 3, "mask": [0, 1, 1]}
    rows = [
        {
            "input_ids": np.array(values["input_ids"], np.uint32),
            "length": values["length"],
            "mask": np.array(values["mask"], np.uint8),
        }
        for values in (good, {**good, **row}, good)
    ]
    directory = _write(tmp_path / "d", columns, rows)
    with pytest.raises(DataError) as caught:
        read(directory, format="tokenized_mds")
    assert caught.value.what == f"{directory}: row 1"
    assert said in caught.value.rule
    found = read(directory, format="tokenized_mds", on_bad_document="drop")
    assert [document.key for document in found.documents] == ["d row 0", "d row 2"]
    assert [(r.key, r.reason) for r in found.rejected] == [("d row 1", reason)]


def test_floats_are_no_tokens(tmp_path, read):
    _write(tmp_path / "d", {"input_ids": "ndarray:float32"}, [{"input_ids": np.ones(3, np.float32)}])
    with pytest.raises(DataError, match=r"row 0: has input_ids of shape \[3\] and type float32, not integers"):
        read(tmp_path / "d", format="tokenized_mds")


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([[0, 4], [3, 10]], "has span 1 from 3 to 10, which begins before the end of the one before it, 4."),
        ([[4, 10], [0, 4]], "has span 0 from 4 to 10, which leaves tokens from 0 to 4 to no document."),
        ([[0, 11]], "has span 0 from 0 to 11, which leaves the row of 10 tokens."),
        ([[0, 4], [4, 4], [4, 10]], "has span 1 from 4 to 4, which holds no token."),
        ([[0, 4], [5, 10]], "has span 1 from 5 to 10, which leaves tokens from 4 to 5 to no document."),
        ([[0, 9]], "has no span for its tokens from 9 to 10."),
        ([0, 10], "has spans of shape [2] and type uint32, not integers [documents, 2]."),
    ],
)
def test_spans_that_do_not_tile_a_row_are_refused_with_the_row(tmp_path, read, spans, said):
    rows = _packed_rows(3)
    rows[2]["indices"] = np.array(spans, np.uint32)
    directory = _write(tmp_path / "d", _PACKED, rows)
    with pytest.raises(DataError) as caught:
        read(directory, format="packed_mds")
    assert (caught.value.what, caught.value.rule) == (f"{directory}: row 2", said)
    found = read(directory, format="packed_mds", on_bad_document="drop")
    assert (len(found.documents), [r.reason for r in found.rejected]) == (6, ["bad_spans"])


def test_rows_of_several_documents_are_no_tokenized_documents(tmp_path, read):
    directory = _write(tmp_path / "d", _PACKED, _packed_rows(1))
    with pytest.raises(DataError, match=r"row 0: holds 3 documents by its indices.* format=packed_mds"):
        read(directory, format="tokenized_mds")


def test_truncated_empty_and_incomplete_data_are_refused(tmp_path, read):
    directory = _write(tmp_path / "d", _PACKED, _packed_rows(3))
    with pytest.raises(DataError, match="has no column input_ids"):
        read(_write(tmp_path / "e", {"tokens": "int"}, [{"tokens": 1}]), format="tokenized_mds")
    with pytest.raises(DataError, match="has no rows"):
        read(_write(tmp_path / "f", _PACKED, []), format="packed_mds")
    shard = next(directory.glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"shard\.00000\.mds"):
        read(directory, format="packed_mds", on_bad_document="drop")
    (directory / "index.json").write_text(json.dumps({"version": 2, "shards": "x"}))
    with pytest.raises(DataError, match=r"index\.json"):
        read(directory, format="packed_mds")
