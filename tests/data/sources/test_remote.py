"""Sources at an address: the same documents as from the local directory, under the same names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.sources import detect_format
from nemo_prolong.errors import DataError


@pytest.fixture
def bucket() -> Iterator[str]:
    """Return an address in the memory of this process."""
    store = fsspec.filesystem("memory")
    yield "memory://sources-test"
    store.rm("/sources-test", recursive=True)


def _write(directory: Path, kind: str) -> None:
    directory.mkdir()
    if kind == "jsonl":
        for name in ("b", "a"):
            lines = [json.dumps({"text": f"{name} {number}"}) for number in range(9)]
            (directory / f"{name}.jsonl").write_text("\n".join(lines))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": ["one", "two", "three"]}), directory / "a.parquet", row_group_size=1)
    elif kind == "text":
        (directory / "a.md").write_text("caf\u00e9")
        (directory / "deep").mkdir()
        (directory / "deep" / "b.txt").write_text("two")
    else:
        for part in ("one", "two"):
            with MdsWriter(directory / part, {"input_ids": "ndarray:uint32"}, 200) as writer:
                for number in range(9):
                    writer.write({"input_ids": np.arange(number + 1, dtype=np.uint32)})


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text", "tokenized_mds"])
@pytest.mark.parametrize("unit_bytes", [50, 2**20])
def test_an_address_gives_what_the_directory_gives(tmp_path, bucket, read, kind, unit_bytes):
    _write(tmp_path / "corpus", kind)
    fsspec.filesystem("memory").put(f"{tmp_path}/corpus", f"{bucket}/corpus", recursive=True)
    settings = {"unit_bytes": unit_bytes, "cache": tmp_path / "cache", "format": kind}
    there, here = read(f"{bucket}/corpus", **settings), read(tmp_path / "corpus", **settings)
    assert len(here.documents) > 1 and there.texts == here.texts
    assert [d.key for d in there.documents] == [d.key for d in here.documents]
    for remote, local in zip(there.documents, here.documents, strict=True):
        np.testing.assert_array_equal(remote.input_ids, local.input_ids)
    source = SourceConfig(domain="d", path=f"{bucket}/corpus")
    assert detect_format(source, tmp_path / "cache").value == kind


def test_an_address_with_nothing_at_it_is_refused(read, bucket):
    fsspec.filesystem("memory").touch("/sources-test/a.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        read(f"{bucket}/nowhere", format="jsonl")
