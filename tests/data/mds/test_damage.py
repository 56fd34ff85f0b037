"""Indexes and shards that are damaged, hostile or of another kind: each is refused with the place named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.data.mds import MdsReader
from nemo_prolong.errors import DataError
from tests.support.mds_examples import (
    ALL_COLUMNS,
    SMALL_COLUMNS,
    edit_index,
    flip,
    numbered_row,
    same_row,
    varied_row,
    write,
)


@pytest.fixture(scope="session", params=[(), ("sha256",)], ids=["plain", "hashed"])
def shard_to_damage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of four rows of every encoding."""
    directory = tmp_path_factory.mktemp("damage") / "rows"
    return write(directory, [varied_row(n) for n in range(4)], ALL_COLUMNS, hashes=request.param)


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_any_flipped_byte_is_found_by_the_hash(shard_to_damage: Path, where: float, bits: int) -> None:
    shard = shard_to_damage / "shard.00000.mds"
    whole = shard.read_bytes()
    flip(shard, int(where * len(whole)), bits)
    try:
        found = MdsReader(shard_to_damage)
        rows = [found[row] for row in range(4)]
    except DataError as error:
        assert str(shard) in str(error)
        assert "(bytes " in str(error)
    else:
        # Without hashes a changed value is a value; what is not changed has to be as it was.
        assert found.shards[0].raw.hashes == {}
        assert sum(not same_row(row, varied_row(number)) for number, row in enumerate(rows)) <= 1
    finally:
        shard.write_bytes(whole)


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), listed=st.booleans())
def test_a_truncated_shard_is_named_with_its_byte_range(shard_to_damage: Path, where: float, listed: bool) -> None:
    """Also where the index was made of the truncated file."""
    shard, index = shard_to_damage / "shard.00000.mds", shard_to_damage / "index.json"
    whole, whole_index = shard.read_bytes(), index.read_text()
    size = int(where * len(whole))
    shard.write_bytes(whole[:size])
    if listed:
        edit_index(shard_to_damage, lambda index: index["shards"][0]["raw_data"].update(bytes=size))
    try:
        with pytest.raises(DataError, match=r"shard.00000.mds: .*bytes \d+ to \d+") as caught:
            MdsReader(shard_to_damage)[0]
        if not listed:
            assert (
                f"has {size} bytes, the index says {len(whole)}: bytes {size} to {len(whole)} are" in caught.value.rule
            )
    finally:
        shard.write_bytes(whole)
        index.write_text(whole_index)


def test_verify_reports_every_damaged_shard(many_shards: Path) -> None:
    found = MdsReader(many_shards)
    assert list(found.verify()) == []
    flip(many_shards / "shard.00001.mds", 4, 1)
    last_row = int.from_bytes((many_shards / "shard.00003.mds").read_bytes()[4:8], "little")
    flip(many_shards / "shard.00003.mds", last_row, 1)
    errors = [str(error) for error in found.verify()]
    assert len(errors) == 2
    assert "shard.00001.mds: its description of the columns is damaged" in errors[0]
    assert "shard.00003.mds: row 0 cannot be decoded" in errors[1] or "shard.00003.mds: row 0 holds" in errors[1]


def test_verify_compares_hashes_of_shards_read_before(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [numbered_row(1)], SMALL_COLUMNS)
    found = MdsReader(directory)
    assert found[0]["domain"] == "row 1"
    flip(directory / "shard.00000.mds", -1, 1)
    (error,) = found.verify()
    assert "shard.00000.mds: its sha256 is" in str(error)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 9, r"its header does not hold \d+ rows"),
        (4, 1, "its row offsets do not ascend"),
        (8, 2**31, "its row offsets do not ascend"),
    ],
)
def test_a_damaged_header_is_refused_when_the_shard_opens(
    many_shards: Path, position: int, value: int, message: str
) -> None:
    shard = many_shards / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[position : position + 4] = value.to_bytes(4, "little")
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"shard.00000.mds: {message}.*\(bytes \d to \d+\)"):
        MdsReader(many_shards)[0]


def test_a_shard_with_other_columns_than_its_index_is_refused(many_shards: Path) -> None:
    shard = many_shards / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"ndarray:uint32", b"ndarray:uint16"))
    with pytest.raises(DataError, match=r"its columns are .*uint16.*, the index says .*uint32.* \(bytes \d+ to \d+\)"):
        MdsReader(many_shards)[0]


def test_a_row_with_a_gap_is_refused_with_its_bytes(many_shards: Path) -> None:
    shard = many_shards / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    begin = int.from_bytes(data[4:8], "little")
    data[begin] += 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"shard.00000.mds: row 0 .*bytes {begin} to"):
        MdsReader(many_shards)[0]


@pytest.mark.parametrize("encoding", ["pkl", "jpeg", "ndarray:object", "ndarray:uint32:0", "ndarray:uint32:a", "uint3"])
def test_pickles_images_and_unknown_encodings_are_refused(many_shards: Path, encoding: str) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["shards"][0]["column_encodings"][0] = encoding

    edit_index(many_shards, rename)
    with pytest.raises(DataError, match=rf"index.json: column domain={encoding}: is (an encoding|no array encoding)"):
        MdsReader(many_shards)


@pytest.mark.parametrize("name", ["../x.mds", "/etc/passwd", "a/../../x", "a\\x.mds", "", ".", None, "a//b", "a\0b"])
@pytest.mark.parametrize("file", ["raw_data", "zip_data"])
def test_a_shard_outside_its_directory_is_refused(many_shards: Path, file: str, name: Any) -> None:
    def rename(index: dict[str, Any]) -> None:
        index["shards"][1][file] = {**index["shards"][1]["raw_data"], "basename": name}

    edit_index(many_shards, rename)
    with pytest.raises(DataError, match="a shard lies below the directory of its index"):
        MdsReader(many_shards)


def test_a_missing_shard_is_named(many_shards: Path) -> None:
    (many_shards / "shard.00002.mds").unlink()
    with pytest.raises(DataError, match=r"shard.00002.mds: is in index.json but missing"):
        MdsReader(many_shards)


def test_a_shard_that_has_grown_is_named_with_the_bytes(many_shards: Path) -> None:
    shard = many_shards / "shard.00002.mds"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(DataError, match=rf"shard.00002.mds: has {size + 1} bytes, .*bytes {size} to {size + 1} should"):
        MdsReader(many_shards)


@pytest.mark.parametrize("change", [{"names": ["domain", "text"]}, {"encodings": ["str", "ndarray:int32"]}])
def test_shards_of_different_columns_are_refused(many_shards: Path, change: dict[str, list[str]]) -> None:
    edit_index(
        many_shards,
        lambda index: index["shards"][7].update({f"column_{field}": value for field, value in change.items()}),
    )
    with pytest.raises(
        DataError,
        match=r"rows: shard.00007.mds: has the columns domain=str, .*, but shard.00000.mds has domain=str, input_ids=",
    ):
        MdsReader(many_shards)


def test_shards_of_another_order_of_columns_are_refused(many_shards: Path) -> None:
    def reverse(index: dict[str, Any]) -> None:
        for field in ("column_names", "column_encodings", "column_sizes"):
            index["shards"][3][field].reverse()

    edit_index(many_shards, reverse)
    with pytest.raises(DataError, match=r"shard.00003.mds: has the columns input_ids=ndarray:uint32, domain=str, but"):
        MdsReader(many_shards)


def test_directories_with_different_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tree" / "a", [numbered_row(1)], SMALL_COLUMNS)
    write(tmp_path / "tree" / "b", [varied_row(1)], ALL_COLUMNS)
    with pytest.raises(
        DataError, match=r"tree: b/shard.00000.mds: has the columns any=.*but a/shard.00000.mds has domain"
    ):
        MdsReader(tmp_path / "tree")


def test_a_shard_that_is_listed_twice_is_refused(many_shards: Path) -> None:
    edit_index(many_shards, lambda index: index["shards"].append(index["shards"][4]))
    with pytest.raises(DataError, match=r"index.json: shard.00004.mds: is listed twice"):
        MdsReader(many_shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "json"}, "shard.00000.mds: is a json shard of version 2"),
        ({"version": 1}, "shard.00000.mds: is a mds shard of version 1"),
        ({"samples": -1}, "index.json: describes no shard .samples is -1"),
        ({"samples": 2**32}, "describes no shard .samples is 4294967296"),
        ({"samples": 3.0}, "describes no shard .samples is 3.0"),
        ({"raw_data": None}, "describes no shard"),
        ({"raw_data": {"basename": "x", "bytes": 1}}, "describes a shard without 'hashes'"),
        ({"raw_data": {"basename": "x", "bytes": 1, "hashes": {"md5": 7}}}, "hashes are no texts by algorithm"),
        ({"column_names": "domain"}, "column_names is no list"),
        ({"column_names": ["domain", "domain"]}, r"describes columns \['domain', 'domain'\] with encodings"),
        ({"column_sizes": [None]}, "describes columns"),
        ({"column_sizes": [8, None]}, "column domain=str: has values of None bytes, not 8"),
    ],
)
def test_an_index_that_describes_no_shard_is_refused(many_shards: Path, change: dict[str, Any], message: str) -> None:
    edit_index(many_shards, lambda index: index["shards"][0].update(change))
    with pytest.raises(DataError, match=message):
        MdsReader(many_shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": 2', "is not an MDS index .JSONDecodeError"),
        ("[" * 100_000, "is not an MDS index .RecursionError"),
        ("[]", "is not an MDS index .TypeError"),
        ('{"version": 2}', "is not an MDS index .KeyError.'shards'"),
        ('{"version": 1, "shards": []}', "version=1: only version 2 of the format is read"),
        ('{"version": 2, "shards": [{"format": "mds"}]}', "describes a shard without 'version'"),
        ('{"version": 2, "shards": ["x"]}', "describes no shard"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=f"index.json: {message}"):
        MdsReader(tmp_path)


def test_a_directory_without_index_is_refused(tmp_path: Path, many_shards: Path) -> None:
    (many_shards / "index.json").unlink()
    shutil.copytree(many_shards, tmp_path / "tree" / "deep")
    for place in (many_shards, tmp_path / "tree", tmp_path / "no" / "such", many_shards / "shard.00000.mds"):
        with pytest.raises(DataError, match=rf"{place}: has no index.json, nor has a directory below it"):
            MdsReader(place)
