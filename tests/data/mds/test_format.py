"""The bytes of shards and indexes, and what can be known of them before they are written."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.data.mds import OFFSET_BYTES, MdsReader, ShardFormat
from nemo_prolong.errors import ConfigError, DataError
from tests.support.mds_examples import COLUMNS, SMALL_COLUMNS, golden_row, numbered_row, packed_row, write

# What mosaicml-streaming 0.13.0 writes for `golden_row`; `make test-interop` compares with the library itself.
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


def test_a_shard_is_byte_for_byte_what_the_reference_writes(tmp_path: Path) -> None:
    directory = write(tmp_path / "rows", [golden_row()], COLUMNS, hashes=())
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


def test_shards_in_any_order_give_the_sequential_directory(tmp_path: Path) -> None:
    rows = [numbered_row(n) for n in range(60)]
    sequential = write(tmp_path / "a", rows, SMALL_COLUMNS, shard_bytes=800)
    form = ShardFormat(SMALL_COLUMNS, 800)
    bounds = np.cumsum([0, *(shard.rows for shard in MdsReader(sequential).shards)]).tolist()
    parallel, entries = tmp_path / "b", {}
    parallel.mkdir()
    for number in reversed(range(len(bounds) - 1)):
        encoded = [form.encode(row) for row in rows[bounds[number] : bounds[number + 1]]]
        entries[number] = form.write_shard(parallel, f"shard.{number:05d}.mds", encoded)
    form.write_index(parallel, [json.loads(json.dumps(entries[number])) for number in sorted(entries)])
    files = sorted(file.name for file in sequential.iterdir())
    assert len(files) > 4
    assert files == sorted(file.name for file in parallel.iterdir())
    for name in files:
        assert (sequential / name).read_bytes() == (parallel / name).read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 400), st.integers(0, 40)), max_size=20), st.text(max_size=5))
def test_the_size_of_a_shard_follows_from_its_rows(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], domain: str
) -> None:
    form = ShardFormat(COLUMNS)
    assert form.variable_columns == ("domain", "indices", "input_ids", "mask")
    rows = [{**packed_row(seed, tokens), "domain": domain} for tokens, seed in shapes]
    planned = [
        form.row_bytes({"domain": domain, **{name: row[name].shape for name in ("indices", "input_ids", "mask")}})
        for row in rows
    ]
    encoded = [form.encode(row) for row in rows]
    assert planned == [len(data) + OFFSET_BYTES for data in encoded]
    entry = form.write_shard(tmp_path_factory.mktemp("size"), "shard.00000.mds", encoded)
    assert entry["raw_data"]["bytes"] == form.overhead_bytes + sum(planned)


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:9"])
def test_the_index_holds_both_hashes_and_the_bytes_repeat(tmp_path: Path, compression: str | None) -> None:
    options = {"compression": compression, "hashes": ("md5", "sha256")}
    first, second = (write(tmp_path / name, [packed_row(1, 50_000)], COLUMNS, **options) for name in "ab")
    shard = json.loads((first / "index.json").read_text())["shards"][0]
    stored = first / "shard.00000.mds" if compression is None else first / "shard.00000.mds.zstd"
    assert [file.name for file in sorted(first.iterdir())] == ["index.json", stored.name]
    assert stored.read_bytes() == (second / stored.name).read_bytes()
    assert (first / "index.json").read_bytes() == (second / "index.json").read_bytes()
    raw = stored.read_bytes()
    if compression is not None:
        assert shard["zip_data"] == _described(stored.name, raw)
        raw = zstandard.decompress(raw)
    assert shard["raw_data"] == _described("shard.00000.mds", raw)
    assert (shard["compression"], shard["hashes"]) == (compression, ["md5", "sha256"])


def _described(name: str, data: bytes) -> dict[str, Any]:
    hashes = {"md5": hashlib.md5(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}
    return {"basename": name, "bytes": len(data), "hashes": hashes}


def test_a_format_is_a_key_of_caches_and_can_be_sent() -> None:
    form = ShardFormat(SMALL_COLUMNS, 800, "zstd")
    copy = pickle.loads(pickle.dumps(form))
    assert (copy, hash(copy)) == (form, hash(form))
    assert copy.encode(numbered_row(3)) == form.encode(numbered_row(3))
    assert {form, copy, ShardFormat(SMALL_COLUMNS, 801, "zstd")} == {form, ShardFormat(SMALL_COLUMNS, 801, "zstd")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "shard_bytes=0: an MDS shard holds less than 4 GiB"),
        ({"shard_bytes": 2**32}, "shard_bytes=4294967296: an MDS shard holds less than 4 GiB"),
        ({"compression": "gz"}, "compression=gz: is no compression of shards. Use zstd or zstd:3"),
        ({"compression": "zstd:23"}, "compression=zstd:23: is no compression of shards"),
        ({"hashes": ("crc",)}, r"hashes=\['crc'\]: are no hash algorithms in sorted order. Take some of .*sha256"),
        ({"hashes": ("sha256", "md5")}, r"hashes=\['sha256', 'md5'\]: are no hash algorithms in sorted order"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardFormat(SMALL_COLUMNS, **options)


def test_a_refused_encoding_is_named_with_its_column() -> None:
    with pytest.raises(DataError, match="column domain=pkl: is an encoding this reader refuses"):
        ShardFormat({"domain": "pkl"})


def test_a_row_with_other_columns_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"columns=\['domain'\]: a row has exactly the columns \['domain', 'input_ids'\]"
    ):
        ShardFormat(SMALL_COLUMNS).encode({"domain": "x"})


def test_a_value_that_does_not_fit_is_named_with_its_column() -> None:
    with pytest.raises(DataError, match=r"column input_ids: expected an array of uint32, got int64. Give a value that"):
        ShardFormat(SMALL_COLUMNS).encode({"input_ids": np.zeros(3, np.int64), "domain": "x"})


def test_a_shard_of_more_than_4_gib_is_refused_early(tmp_path: Path) -> None:
    row = bytes(2**20)
    with pytest.raises(DataError, match=r"shard of 42949839[0-9]{2} bytes: an MDS shard holds less than 4 GiB"):
        ShardFormat(SMALL_COLUMNS).write_shard(tmp_path, "shard.00000.mds", [row] * 4096)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_cannot_be_published_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "shard.00000.mds" / "in the way").mkdir(parents=True)
    form = ShardFormat(SMALL_COLUMNS)
    with pytest.raises(IsADirectoryError):
        form.write_shard(tmp_path, "shard.00000.mds", [form.encode(numbered_row(1))])
    assert [path.name for path in tmp_path.iterdir()] == ["shard.00000.mds"]


def test_importing_it_loads_no_library_but_numpy() -> None:
    program = "import sys, nemo_prolong.data.mds; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert "numpy" in ours
    assert ours - {"numpy", "nemo_prolong", "cython_runtime", "sitecustomize"} == set()
