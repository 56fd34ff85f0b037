"""Tensors, layers and rows of a checkpoint are those that were saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights import checkpoint_reader
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from tests.weights.conftest import OTHERS, TENSORS, in_two_shards

STACKED, MATRIX, NORM = (
    "decoder.layers.mlp.linear_fc1.weight",
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
)


@pytest.fixture(params=["", "module.", "module.module."])
def reader(request: pytest.FixtureRequest, write_checkpoint: Callable[..., Path]) -> CheckpointReader:
    """A reader of a checkpoint whose names have the prefix of Megatron's wrappers."""
    # The optimizer's names have no prefix.
    prefixed = {request.param + name: tensor for name, tensor in TENSORS.items()}
    reader = CheckpointReader(write_checkpoint({**prefixed, **OTHERS, "rng_state": b"bytes"}))
    assert reader.wrapper_prefix == request.param
    return reader


def test_the_tensors_of_the_model_are_named_without_wrappers(reader: CheckpointReader) -> None:
    assert sorted(reader.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(reader.read(name), tensor)


def test_a_layer_is_that_entry_of_the_stack(reader: CheckpointReader) -> None:
    for layer in range(3):
        found = reader.read_layer(STACKED, layer)
        assert found.dtype == torch.bfloat16 and torch.equal(found, TENSORS[STACKED][layer])
        # The second time its chunks are known.
        assert torch.equal(reader.read_layer(STACKED, layer), found)


def test_rows_fill_the_destination_and_nothing_else(reader: CheckpointReader) -> None:
    rows = torch.full((5, 24), torch.nan)
    reader.read_rows(MATRIX, 30, rows[1:4])
    assert torch.equal(rows[1:4], TENSORS[MATRIX][30:33])
    assert rows[[0, 4]].isnan().all()
    reader.read_rows(MATRIX, 7, rows[:1])
    assert torch.equal(rows[0], TENSORS[MATRIX][7])
    of_a_layer = torch.empty(4, 8, dtype=torch.bfloat16)
    reader.read_rows(STACKED, 3, of_a_layer, layer=2)
    assert torch.equal(of_a_layer, TENSORS[STACKED][2, 3:7])
    part = torch.empty(6)
    reader.read_rows(NORM, 10, part)
    assert torch.equal(part, TENSORS[NORM][10:16])


def test_only_the_chunks_of_a_layer_are_looked_at(reader: CheckpointReader) -> None:
    key, entry = reader._entries[STACKED]
    (chunk,) = entry.chunks
    parts = [
        dataclasses.replace(chunk, offsets=torch.Size((start, 0, 0)), sizes=torch.Size((layers, 20, 8)))
        for start, layers in ((0, 1), (1, 2))
    ]
    reader._entries[STACKED] = (key, dataclasses.replace(entry, chunks=parts))
    assert [reader._layer(STACKED, layer).chunks for layer in range(3)] == [parts[:1], parts[1:], parts[1:]]


@pytest.fixture
def sharded(write_checkpoint: Callable[..., Path]) -> CheckpointReader:
    """A reader of a matrix and a stack, each in two shards."""
    parts = {f"{MATRIX}/0": TENSORS[MATRIX][:20], f"{MATRIX}/1": TENSORS[MATRIX][20:]}
    parts |= {f"{STACKED}/0": TENSORS[STACKED][:1], f"{STACKED}/1": TENSORS[STACKED][1:]}
    checkpoint = write_checkpoint({name: tensor.clone() for name, tensor in parts.items()})
    in_two_shards(checkpoint, MATRIX, 20)
    in_two_shards(checkpoint, STACKED, 1)
    return CheckpointReader(checkpoint)


def test_shards_of_several_ranks_are_joined(sharded: CheckpointReader) -> None:
    for name in (MATRIX, STACKED):
        assert torch.equal(sharded.read(name), TENSORS[name])
    for start, count in ((18, 4), (19, 2), (19, 1), (20, 1), (0, 20)):
        rows = torch.empty(count, 24)
        sharded.read_rows(MATRIX, start, rows)
        assert torch.equal(rows, TENSORS[MATRIX][start : start + count])
    for layer in range(3):
        assert torch.equal(sharded.read_layer(STACKED, layer), TENSORS[STACKED][layer])


def test_a_layer_or_row_is_compared_with_its_own_shards(
    sharded: CheckpointReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    create = checkpoint_reader.create_read_items_for_chunk_list

    def noting(key: str, entry: TensorStorageMetadata, boxes: Any) -> Any:
        compared.append(len(entry.chunks))
        return create(key, entry, boxes)

    monkeypatch.setattr(checkpoint_reader, "create_read_items_for_chunk_list", noting)
    sharded.read_layer(STACKED, 2)
    sharded.read_rows(MATRIX, 19, torch.empty(1, 24))
    sharded.read_rows(MATRIX, 19, torch.empty(2, 24))
    sharded.read(MATRIX)
    assert compared == [1, 1, 2, 2]


def test_a_checkpoint_without_a_tensor_has_no_names(write_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader(write_checkpoint({"rng_state": b"bytes"}))
    assert reader.names() == [] and reader.wrapper_prefix == ""


def test_a_tensor_of_which_a_part_is_missing_is_refused(reader: CheckpointReader) -> None:
    key, entry = reader._entries[MATRIX]
    assert isinstance(entry, TensorStorageMetadata)
    half = dataclasses.replace(entry.chunks[0], sizes=torch.Size((20, 24)))
    reader._entries[MATRIX] = (key, dataclasses.replace(entry, chunks=[half]))
    with pytest.raises(CheckpointError) as caught:
        reader.read(MATRIX)
    assert str(caught.value) == (
        f"{reader.directory}: the checkpoint does not hold all of {MATRIX} (480 of 888 elements are there). Use "
        "another checkpoint."
    )


def test_a_shard_that_is_gone_is_refused_with_its_name(reader: CheckpointReader) -> None:
    for shard in reader.directory.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        reader.read(NORM)
    message = str(caught.value)
    assert message.startswith(f"{reader.directory}: the checkpoint does not hold all of {NORM} (")
    assert "No such file or directory" in message and ".distcp" in message
    assert message.endswith("). Use another checkpoint.")
