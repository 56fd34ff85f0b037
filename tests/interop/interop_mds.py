"""MDS directories of nemo_prolong and of mosaicml-streaming: the same bytes, and each reads the other's."""

from __future__ import annotations

import filecmp
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.data.mds import MdsReader
from tests.support.mds_examples import (
    ALL_COLUMNS,
    COLUMNS,
    SMALL_COLUMNS,
    numbered_row,
    packed_row,
    same_row,
    varied_row,
    write,
)
from tests.support.reference_mds import merge_index, reference_rows, reference_write

VARIED = [varied_row(number) for number in range(200)]
PACKED = [packed_row(number, 512 * 1024) for number in range(30)]
SHARD_BYTES = [5_000, 64 * 1024, 64 * 2**20]
COMPRESSIONS = [None, "zstd", "zstd:1", "zstd:9"]
HASHES = [(), ("sha256",), ("md5", "sha1", "sha256", "sha512")]


def shuffled(num_rows: int) -> list[int]:
    """Return row numbers in an order that jumps between shards."""
    return random.Random(0).sample(range(num_rows), num_rows)


def assert_same_files(left: Path, right: Path) -> None:
    """Compare two trees byte for byte."""
    names = sorted(file.relative_to(left).as_posix() for file in left.rglob("*"))
    assert names == sorted(file.relative_to(right).as_posix() for file in right.rglob("*"))
    match, differ, failed = filecmp.cmpfiles(left, right, [n for n in names if (left / n).is_file()], shallow=False)
    assert (differ, failed) == ([], [])
    assert "index.json" in match


def assert_reads(directory: Path, rows: list[dict[str, Any]], cache: Path) -> None:
    """Read a directory with our reader, in another order than it was written."""
    reader = MdsReader(directory, cache)
    assert len(reader) == len(rows)
    assert all(same_row(reader[number], rows[number]) for number in shuffled(len(rows)))
    assert list(reader.verify()) == []


def assert_reference_reads(directory: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    """Read a directory with the reference library, in another order than it was written."""
    order = shuffled(len(rows))
    found = reference_rows(directory, order, **options)
    assert all(same_row(row, rows[number]) for row, number in zip(found, order, strict=True))


@pytest.mark.parametrize("hashes", HASHES, ids=len)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("shard_bytes", SHARD_BYTES)
def test_equal_options_give_equal_directories(
    tmp_path: Path, shard_bytes: int, compression: str | None, hashes: tuple[str, ...]
) -> None:
    ours = write(
        tmp_path / "ours", VARIED, ALL_COLUMNS, shard_bytes=shard_bytes, compression=compression, hashes=hashes
    )
    options = {"size_limit": shard_bytes, "compression": compression, "hashes": list(hashes)}
    theirs = reference_write(tmp_path / "theirs", VARIED, ALL_COLUMNS, **options)
    assert_same_files(ours, theirs)
    assert_reads(theirs, VARIED, tmp_path / "cache")
    assert_reference_reads(ours, VARIED, validate_hash=hashes[-1] if hashes else None)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_rows_of_512k_tokens_give_equal_directories(tmp_path: Path, compression: str | None) -> None:
    ours = write(tmp_path / "ours", PACKED, COLUMNS, compression=compression)
    theirs = reference_write(tmp_path / "theirs", PACKED, COLUMNS, compression=compression, hashes=["sha256"])
    assert len(MdsReader(ours).shards) == 2
    assert_same_files(ours, theirs)
    assert_reads(theirs, PACKED, tmp_path / "cache")
    assert_reference_reads(ours, PACKED, validate_hash="sha256")


def test_a_first_row_larger_than_a_shard_is_the_one_difference(tmp_path: Path) -> None:
    """The reference writes a shard without rows before it; it is read here, and not written."""
    rows = VARIED[:5]
    ours = write(tmp_path / "ours", rows, ALL_COLUMNS, shard_bytes=1)
    theirs = reference_write(tmp_path / "theirs", rows, ALL_COLUMNS, size_limit=1, hashes=["sha256"])
    assert [shard.rows for shard in MdsReader(ours).shards] == [1, 1, 1, 1, 1]
    assert [shard.rows for shard in MdsReader(theirs).shards] == [0, 1, 1, 1, 1, 1]
    assert_reads(theirs, rows, tmp_path / "cache")
    assert_reference_reads(ours, rows)


@pytest.mark.parametrize("hashes", [["xxh64"], ["sha1", "xxh128", "xxh64"]], ids=len)
@pytest.mark.parametrize("compression", [None, "zstd:22"])
def test_its_own_hashes_and_an_unlimited_shard_are_read(
    tmp_path: Path, compression: str | None, hashes: list[str]
) -> None:
    options = {"size_limit": None, "compression": compression, "hashes": hashes}
    theirs = reference_write(tmp_path / "theirs", VARIED, ALL_COLUMNS, **options)
    assert json.loads((theirs / "index.json").read_text())["shards"][0]["size_limit"] is None
    assert_reads(theirs, VARIED, tmp_path / "cache")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_index_that_it_merges_of_ours_is_read_by_both(tmp_path: Path, compression: str | None) -> None:
    rows = [numbered_row(number) for number in range(90)]
    for part in range(3):
        some = rows[30 * part : 30 * part + 30]
        write(tmp_path / "rows" / f"{part:02d}-64", some, SMALL_COLUMNS, shard_bytes=700, compression=compression)
    parts = [str(index) for index in sorted((tmp_path / "rows").glob("*/index.json"))]
    shutil.copytree(tmp_path / "rows", tmp_path / "tree")
    merge_index(parts, str(tmp_path / "rows"))
    assert (tmp_path / "rows" / "index.json").exists()
    assert_reads(tmp_path / "rows", rows, tmp_path / "cache")
    assert_reads(tmp_path / "tree", rows, tmp_path / "cache")
    assert_reference_reads(tmp_path / "rows", rows, validate_hash="sha256")


@pytest.mark.parametrize("keep_zip", [False, True])
def test_what_it_leaves_after_unpacking_is_read(tmp_path: Path, keep_zip: bool) -> None:
    """Its local copy of a remote directory holds unpacked shards, with or without the compressed ones."""
    remote = write(tmp_path / "remote", VARIED, ALL_COLUMNS, shard_bytes=5_000, compression="zstd")
    local = tmp_path / "local"
    assert_reference_reads(local, VARIED, remote=str(remote), keep_zip=keep_zip)
    shards = MdsReader(remote).shards
    assert all((local / shard.raw.name).exists() for shard in shards)
    assert all((local / shard.packed.name).exists() == keep_zip for shard in shards if shard.packed)
    assert_reads(local, VARIED, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_shard_of_ours_is_refused_by_hash_too(tmp_path: Path) -> None:
    remote = write(tmp_path / "remote", VARIED, ALL_COLUMNS)
    data = bytearray((remote / "shard.00000.mds").read_bytes())
    data[-1] ^= 1
    (remote / "shard.00000.mds").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="Checksum failure"):
        reference_rows(tmp_path / "local", [0], remote=str(remote), validate_hash="sha256")
