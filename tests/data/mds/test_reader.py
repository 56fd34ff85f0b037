"""Rows of local directories, plain, compressed and nested."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.data.mds import MdsReader, hashing, reader
from nemo_prolong.errors import DataError
from tests.support.mds_examples import (
    ALL_COLUMNS,
    COLUMNS,
    SMALL_COLUMNS,
    domains,
    edit_index,
    numbered_row,
    packed_row,
    same_row,
    varied_row,
    write,
)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(300, 5000), st.sampled_from([None, "zstd"]))
def test_rows_come_back_in_order_whatever_the_shard_size(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, shard_bytes: int, compression: str | None
) -> None:
    rows = [numbered_row(n) for n in range(num_rows)]
    directory = tmp_path_factory.mktemp("a")
    write(directory / "rows", rows, SMALL_COLUMNS, shard_bytes=shard_bytes, compression=compression)
    found = MdsReader(directory / "rows", cache=directory / "cache")
    assert len(found) == num_rows
    assert all(same_row(found[number], rows[number]) for number in reversed(range(num_rows)))


def test_rows_of_every_encoding_come_back(tmp_path: Path) -> None:
    rows = [varied_row(n) for n in range(50)]
    found = MdsReader(write(tmp_path / "rows", rows, ALL_COLUMNS, shard_bytes=5000))
    assert found.columns == ALL_COLUMNS
    for number, row in enumerate(rows):
        assert same_row(found[number], row)


def test_more_shards_than_are_kept_open_can_be_read(many_shards: Path) -> None:
    found = MdsReader(many_shards)
    assert len(found.shards) > reader._OPEN_SHARDS
    views = [found[n * 191 % 500]["input_ids"] for n in range(500)]
    assert [int(view[0]) for view in views] == [n * 191 % 500 for n in range(500)]
    assert len(found._open) == reader._OPEN_SHARDS
    assert not views[0].flags.writeable


def test_a_reader_with_open_shards_can_be_sent_on(many_shards: Path) -> None:
    found = MdsReader(many_shards)
    assert found[3]["domain"] == "row 3"
    assert pickle.loads(pickle.dumps(found))[499]["domain"] == "row 499"


def test_a_row_beyond_the_last_is_an_index_error(many_shards: Path) -> None:
    with pytest.raises(IndexError, match=r"row 500 of .* which has 500"):
        MdsReader(many_shards)[500]


def test_a_missing_column_is_named_with_those_there_are(many_shards: Path) -> None:
    found = MdsReader(many_shards)
    found.require_columns("domain", "input_ids")
    with pytest.raises(DataError, match=r"shard.00000.mds: has no column mask, but domain, input_ids."):
        found.require_columns("domain", "mask")


def test_hashes_are_compared_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [numbered_row(n) for n in range(3)]
    directory = write(tmp_path / "rows", rows, SMALL_COLUMNS, shard_bytes=1, hashes=("md5", "sha256"))
    hashed: list[str] = []
    digest = hashing.digest
    monkeypatch.setattr("nemo_prolong.data.mds.mapped.digest", lambda *args: hashed.append(args[0]) or digest(*args))
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 1)
    found = MdsReader(directory)
    assert hashed == []
    for _ in range(3):
        assert domains(found) == ["row 0", "row 1", "row 2"]
    assert hashed == ["md5", "sha256"] * 3
    assert domains(pickle.loads(pickle.dumps(found))) == ["row 0", "row 1", "row 2"]
    assert hashed == ["md5", "sha256"] * 6


def test_hashes_of_the_package_xxhash_are_compared(tmp_path: Path) -> None:
    xxhash = pytest.importorskip("xxhash", reason="xxhash comes with the package datasets, which is not installed")
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS, hashes=())
    digest = xxhash.xxh64((directory / "shard.00000.mds").read_bytes()).hexdigest()
    edit_index(directory, lambda index: index["shards"][0]["raw_data"].update(hashes={"xxh64": digest}))
    assert MdsReader(directory)[0]["domain"] == "row 1"
    edit_index(directory, lambda index: index["shards"][0]["raw_data"].update(hashes={"xxh64": "0" * 16}))
    with pytest.raises(DataError, match=f"shard.00000.mds: its xxh64 is {digest}, the index says 0000000000000000"):
        MdsReader(directory)[0]


def test_a_hash_that_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS)
    edit_index(directory, lambda index: index["shards"][0]["raw_data"].update(hashes={"crc9": "00"}))
    with pytest.raises(DataError, match=r"shard.00000.mds: hash crc9: cannot be checked with hashlib or the package"):
        MdsReader(directory)[0]


def test_compressed_shards_are_read_through_the_default_cache(tmp_path: Path, cache_directory: Path) -> None:
    rows = [packed_row(n, 4096) for n in range(5)]
    found = MdsReader(write(tmp_path / "rows", rows, COLUMNS, shard_bytes=50_000, compression="zstd:5"))
    assert not cache_directory.exists()
    assert all(same_row(found[number], row) for number, row in enumerate(rows))
    copies = sorted(path.name[-15:] for path in cache_directory.iterdir() if path.suffix == ".mds")
    assert copies == sorted(shard.raw.name for shard in found.shards)
    assert len(copies) == 3


def test_a_compressed_shard_beside_the_plain_one_needs_no_cache(tmp_path: Path, cache_directory: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(n) for n in range(9)], SMALL_COLUMNS, compression="zstd")
    packed = directory / "shard.00000.mds.zstd"
    (directory / "shard.00000.mds").write_bytes(zstandard.decompress(packed.read_bytes()))
    for keep_packed in (True, False):
        if not keep_packed:
            packed.unlink()
        assert domains(MdsReader(directory)) == [f"row {n}" for n in range(9)]
    assert not cache_directory.exists()


def test_a_compressed_shard_that_is_damaged_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS, compression="zstd")
    packed = directory / "shard.00000.mds.zstd"
    data = bytearray(packed.read_bytes())
    data[len(data) // 2] ^= 1
    packed.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"rows/shard.00000.mds.zstd: "):
        MdsReader(directory)[0]
    packed.write_bytes(bytes(data[:-1]))
    with pytest.raises(
        DataError, match=rf"shard.00000.mds.zstd: has {len(data) - 1} bytes, the index says {len(data)}"
    ):
        MdsReader(directory)


def test_a_damaged_copy_in_the_cache_is_named_for_removal(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS, compression="zstd")
    assert MdsReader(directory, tmp_path / "cache")[0]["domain"] == "row 1"
    (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix == ".mds")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"shard.00000.mds.zstd: its sha256 is .* Remove the copy {copy};"):
        MdsReader(directory, tmp_path / "cache")[0]


def test_a_compression_that_is_not_read_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS, compression="zstd")
    edit_index(directory, lambda index: index["shards"][0].update(compression="br:4"))
    with pytest.raises(DataError, match=r"shard.00000.mds.zstd: is compressed with br:4. Give plain shards, or zstd."):
        MdsReader(directory)


def test_sub_directories_under_one_merged_index_are_read(nested: Path) -> None:
    assert domains(MdsReader(nested / "merged")) == [f"row {n}" for n in range(30)]


def test_a_tree_without_a_merged_index_is_read_by_path(nested: Path) -> None:
    found = MdsReader(nested / "tree")
    assert domains(found) == [f"row {n}" for n in [*range(10), *range(20, 30), *range(10, 20)]]
    assert found.shards[0].raw.name == "code/0/shard.00000.mds"


def test_hidden_directories_and_nested_indexes_are_left_out(nested: Path) -> None:
    tree = nested / "tree"
    shutil.copytree(tree / "code" / "0", tree / ".rows.partial")
    shutil.copytree(tree / "code" / "0", tree / "code" / "0" / "deeper")
    assert len(MdsReader(tree)) == 30


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Three directories of ten rows: ``merged`` has an index of all, ``tree`` one in each of them."""
    places = ["code/0", "code/2", "code/10"]
    shards = []
    for part, place in enumerate(places):
        rows = [numbered_row(10 * part + n) for n in range(10)]
        directory = write(tmp_path / "tree" / place, rows, SMALL_COLUMNS, shard_bytes=600)
        for shard in json.loads((directory / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{place}/{shard['raw_data']['basename']}"
            shards.append(shard)
    shutil.copytree(tmp_path / "tree", tmp_path / "merged")
    (tmp_path / "merged" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return tmp_path
