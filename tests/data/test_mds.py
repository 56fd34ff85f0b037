from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_prolong.data.mds.encodings import parse_encoding
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.errors import DataError

COLUMNS = {
    "input_ids": "ndarray:uint32",
    "indices": "ndarray:uint32",
    "domain": "str",
    "length": "uint64",
    "mask": "ndarray:uint8",
}

# What mosaicml-streaming 0.13.0 writes for `golden_row`; docs/data.md says how to write it again.
GOLDEN_HEAD = bytes.fromhex("010000003501000079010000")
GOLDEN_CONFIG = (
    b'{"column_encodings": ["str", "ndarray:uint32", "ndarray:uint32", "uint64", "ndarray:uint8"], '
    b'"column_names": ["domain", "indices", "input_ids", "length", "mask"], '
    b'"column_sizes": [null, null, null, 8, null], "compression": null, "format": "mds", "hashes": [], '
    b'"size_limit": 67108864, "version": 2}'
)
GOLDEN_ROW = bytes.fromhex(
    "06000000" "13000000" "0e000000" "05000000"  # bytes of domain, indices, input_ids, mask
    "636fc3a96465"  # domain
    "080202" "00000000" "01000000" "01000000" "03000000"  # indices: two axes, 2 x 2
    "0403" "01000000" "02000000" "70110100"  # input_ids: one axis of 3
    "0300000000000000"  # length
    "0403" "000101"  # mask
)  # fmt: skip
GOLDEN_INDEX = (
    '{"shards": [{"column_encodings": ["str", "ndarray:uint32", "ndarray:uint32", "uint64", "ndarray:uint8"], '
    '"column_names": ["domain", "indices", "input_ids", "length", "mask"], '
    '"column_sizes": [null, null, null, 8, null], "compression": null, "format": "mds", "hashes": [], '
    '"raw_data": {"basename": "shard.00000.mds", "bytes": 377, "hashes": {}}, "samples": 1, '
    '"size_limit": 67108864, "version": 2, "zip_data": null}], "version": 2}'
)


def golden_row() -> dict[str, Any]:
    return {
        "input_ids": np.array([1, 2, 70000], np.uint32),
        "indices": np.array([[0, 1], [1, 3]], np.uint32),
        "domain": "co\u00e9de",
        "length": 3,
        "mask": np.array([0, 1, 1], np.uint8),
    }


def numbered_row(number: int) -> dict[str, Any]:
    return {"input_ids": np.full(number % 7 + 1, number, np.uint32), "domain": f"row {number}"}


SMALL_COLUMNS = {"input_ids": "ndarray:uint32", "domain": "str"}


def write(directory: Path, rows: list[dict[str, Any]], columns: dict[str, str], **options: int) -> Path:
    with MdsWriter(directory, columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return directory


@pytest.fixture
def many_shards(tmp_path: Path) -> Path:
    return write(tmp_path / "rows", [numbered_row(n) for n in range(500)], SMALL_COLUMNS, shard_bytes=600)


def edit_index(directory: Path, edit: Any) -> None:
    index = json.loads((directory / "index.json").read_text())
    edit(index)
    (directory / "index.json").write_text(json.dumps(index))


def test_a_shard_and_its_index_are_byte_for_byte_what_the_reference_library_writes(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [golden_row()], COLUMNS)
    assert (directory / "shard.00000.mds").read_bytes() == GOLDEN_HEAD + GOLDEN_CONFIG + GOLDEN_ROW
    assert (directory / "index.json").read_text() == GOLDEN_INDEX


def test_the_bytes_of_the_reference_library_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "shard.00000.mds").write_bytes(GOLDEN_HEAD + GOLDEN_CONFIG + GOLDEN_ROW)
    (tmp_path / "index.json").write_text(GOLDEN_INDEX)
    reader = MdsReader(tmp_path)
    assert (len(reader), reader.columns) == (1, dict(sorted(COLUMNS.items())))
    for name, value in golden_row().items():
        np.testing.assert_array_equal(reader[0][name], value)
    assert [reader[0][name].dtype.name for name in ("input_ids", "indices", "mask")] == ["uint32", "uint32", "uint8"]


_ARRAYS = st.sampled_from(["uint8", "int16", "uint32", "int32", "int64", "float32"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=300).filter(lambda s: np.prod(s) < 2000))
)


@given(_ARRAYS)
def test_any_array_survives_an_encoding_with_and_without_a_fixed_dtype(array: np.ndarray) -> None:
    for name in ("ndarray", f"ndarray:{array.dtype}", f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"):
        encoding = parse_encoding(name, "here")
        data = encoding.encode(array)
        assert encoding.size_bytes in (None, len(data))
        decoded = encoding.decode(memoryview(data))
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


@given(st.text(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.binary())
def test_texts_numbers_and_bytes_survive_their_encodings(text: str, signed: int, unsigned: int, data: bytes) -> None:
    for name, value in {"str": text, "int": signed, "uint64": unsigned, "bytes": data, "json": {"a": [text]}}.items():
        encoding = parse_encoding(name, "here")
        assert encoding.decode(memoryview(encoding.encode(value))) == value


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(300, 5000))
def test_rows_come_back_in_order_whatever_the_shard_size(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, shard_bytes: int
) -> None:
    rows = [numbered_row(n) for n in range(num_rows)]
    reader = MdsReader(write(tmp_path_factory.mktemp("a") / "rows", rows, SMALL_COLUMNS, shard_bytes=shard_bytes))
    assert len(reader) == num_rows
    for number in reversed(range(num_rows)):
        assert reader[number]["domain"] == f"row {number}"
        np.testing.assert_array_equal(reader[number]["input_ids"], rows[number]["input_ids"])


def test_more_shards_than_are_kept_open_can_be_read_in_any_order(many_shards: Path) -> None:
    reader = MdsReader(many_shards)
    assert len(list(many_shards.glob("*.mds"))) > 40
    views = [reader[n * 191 % 500]["input_ids"] for n in range(500)]
    assert [int(view[0]) for view in views] == [n * 191 % 500 for n in range(500)]
    assert not views[0].flags.writeable


def test_a_reader_with_open_shards_can_be_sent_to_another_process(many_shards: Path) -> None:
    reader = MdsReader(many_shards)
    assert reader[3]["domain"] == "row 3"
    assert pickle.loads(pickle.dumps(reader))[499]["domain"] == "row 499"


def test_sub_directories_under_one_merged_index_are_read(tmp_path: Path) -> None:
    shards = []
    for part in range(3):
        rows = [numbered_row(10 * part + n) for n in range(10)]
        directory = write(tmp_path / f"{part}-3", rows, SMALL_COLUMNS, shard_bytes=600)
        for shard in json.loads((directory / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part}-3/{shard['raw_data']['basename']}"
            shards.append(shard)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert [row["domain"] for row in MdsReader(tmp_path)] == [f"row {n}" for n in range(30)]


def test_a_row_beyond_the_last_is_an_index_error(many_shards: Path) -> None:
    with pytest.raises(IndexError, match=r"row 500 of .* which has 500"):
        MdsReader(many_shards)[500]


def test_a_failed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer:
        writer.write(numbered_row(1))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_not_there_before_the_last_row_and_leftovers_of_a_killed_writer_are_cleared(
    tmp_path: Path,
) -> None:
    leftover = tmp_path / ".rows.partial" / "shard.00007.mds"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer:
        writer.write(numbered_row(1))
        assert not (tmp_path / "rows").exists()
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["index.json", "shard.00000.mds"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_a_directory_that_exists_is_not_written_into(many_shards: Path) -> None:
    with pytest.raises(DataError, match="rows: exists; shards are never added"):
        MdsWriter(many_shards, SMALL_COLUMNS)


def test_a_row_with_other_columns_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a row has exactly the columns \['domain', 'input_ids'\]"),
        MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer,
    ):
        writer.write({"domain": "x"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3, np.int64), "expected an array of uint32, got int64"),
        (np.zeros(0, np.uint32), r"an array of shape \(0,\) cannot be stored"),
        ([1, 2], "expected ndarray, got list"),
    ],
)
def test_a_value_that_its_encoding_cannot_hold_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    with (
        pytest.raises(DataError, match=f"column input_ids: {message}"),
        MdsWriter(tmp_path / "rows", SMALL_COLUMNS) as writer,
    ):
        writer.write({"input_ids": value, "domain": "x"})


@pytest.mark.parametrize("encoding", ["pkl", "jpeg", "ndarray:object", "ndarray:uint32:0", "ndarray:uint32:a", "uint3"])
def test_pickles_images_and_unknown_encodings_are_refused(many_shards: Path, encoding: str) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["shards"][0]["column_encodings"][0] = encoding

    edit_index(many_shards, rename)
    with pytest.raises(DataError, match=rf"index.json: column domain={encoding}: is (an encoding|no array encoding)"):
        MdsReader(many_shards)


@pytest.mark.parametrize("name", ["../x.mds", "/etc/passwd", "a/../../x", "a\\x.mds", "", ".", None, "a//b"])
def test_a_shard_outside_its_directory_is_refused(many_shards: Path, name: Any) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["shards"][1]["raw_data"]["basename"] = name

    edit_index(many_shards, rename)
    with pytest.raises(DataError, match="a shard lies below the directory of its index"):
        MdsReader(many_shards)


def test_a_missing_shard_is_named(many_shards: Path) -> None:
    (many_shards / "shard.00002.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00002.mds: is in index.json but missing"):
        MdsReader(many_shards)


def test_a_truncated_shard_is_named_with_both_sizes(many_shards: Path) -> None:
    shard = many_shards / "shard.00002.mds"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"shard.00002.mds: has {size - 1} bytes, the index says {size}"):
        MdsReader(many_shards)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 9, "its header does not hold"),
        (4, 1, "its row offsets do not ascend"),
        (8, 2**31, "its row offsets do not ascend"),
    ],
)
def test_a_shard_with_a_damaged_header_is_refused_when_it_is_opened(
    many_shards: Path, position: int, value: int, message: str
) -> None:
    shard = many_shards / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[position : position + 4] = value.to_bytes(4, "little")
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"shard.00000.mds: {message}.*bytes"):
        MdsReader(many_shards)[0]


def test_a_row_whose_columns_do_not_fill_it_is_refused_with_its_bytes(many_shards: Path) -> None:
    shard = many_shards / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin] += 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"shard.00000.mds: row 0 .*bytes {begin} to"):
        MdsReader(many_shards)[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compression", "zstd", "is a mds shard of version 2, compressed"),
        ("format", "json", "is a json shard"),
        ("version", 1, "is a mds shard of version 1"),
    ],
)
def test_other_kinds_of_shard_are_refused(many_shards: Path, key: str, value: Any, message: str) -> None:
    edit_index(many_shards, lambda index: index["shards"][0].update({key: value}))
    with pytest.raises(DataError, match=message):
        MdsReader(many_shards)


def test_a_directory_without_index_and_one_with_a_broken_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no/such: has no index.json, so it is no finished MDS directory"):
        MdsReader(tmp_path / "no/such")
    (tmp_path / "index.json").write_text('{"version": 2')
    with pytest.raises(DataError, match=r"index.json: is not an MDS index"):
        MdsReader(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 2, "shards": [{"format": "mds"}]}')
    with pytest.raises(DataError, match=r"index.json: describes a shard without 'raw_data'"):
        MdsReader(tmp_path)
