"""A directory as ProLong publishes it gives the samples of our own, without a change to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.batch import PackedRow
from nemo_prolong.data.dataset import PackedRowDataset, ValidationRowDataset
from nemo_prolong.data.mds import MdsWriter, ShardFormat

COLUMNS = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32"}
SEQ_LENGTH = 64


def packed_rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        edges = np.array([0, *sorted(rng.choice(np.arange(1, SEQ_LENGTH), 3, replace=False)), SEQ_LENGTH], np.uint32)
        rows.append(
            {
                "domain": "book-65536/65536-65536",
                "indices": np.stack([edges[:-1], edges[1:]], axis=1),
                "input_ids": rng.integers(0, 300, SEQ_LENGTH).astype(np.uint32),
            }
        )
    return rows


def write_published(directory: Path, rows: list[dict[str, Any]], compression: str | None) -> None:
    """Write shards into one folder per process, under one merged index, as ProLong's packer leaves them."""
    form = ShardFormat(COLUMNS, 4000, compression, hashes=())
    entries = []
    for process in range(3):
        own = rows[process * len(rows) // 3 : (process + 1) * len(rows) // 3]
        folder = directory / f"proc{process:02d}-3"
        folder.mkdir(parents=True)
        for shard, start in enumerate(range(0, len(own), 4)):
            entry = form.write_shard(
                folder, f"shard.{shard:05d}.mds", [form.encode(row) for row in own[start : start + 4]]
            )
            for data in ("raw_data", "zip_data"):
                if entry[data]:
                    entry[data]["basename"] = f"{folder.name}/{entry[data]['basename']}"
            entries.append(entry)
    (directory / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


def assert_same_samples(left: PackedRow, right: PackedRow) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_nested_shards_without_length_give_the_samples_of_ours(tmp_path: Path, compression: str | None) -> None:
    rows = packed_rows(30)
    write_published(tmp_path / "theirs", rows, compression)
    with MdsWriter(tmp_path / "ours", {**COLUMNS, "length": "uint64"}) as writer:
        for row in rows:
            writer.write({**row, "length": SEQ_LENGTH})
    cache = str(tmp_path / "cache")
    theirs, ours = (
        PackedRowDataset(
            tmp_path, [MixtureEntry(path=path, proportion=1.0)], SEQ_LENGTH, 7, 75, vocab_size=300, cache=cache
        )
        for path in ("theirs", "ours")
    )
    for index in range(75):
        assert_same_samples(theirs[index], ours[index])
    assert theirs.epochs() == {"theirs": 2.5}
    held_out = ValidationRowDataset(tmp_path, ["theirs"], SEQ_LENGTH, cache=cache)
    for number, row in enumerate(rows):
        assert held_out[number].tokens.tolist() == row["input_ids"].tolist()
        assert held_out[number].cu_seqlens.tolist() == [0, *row["indices"][:, 1].tolist()]
