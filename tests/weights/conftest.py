"""A checkpoint of a few tensors, as torch and Megatron write it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

TENSORS = {
    "embedding.word_embeddings.weight": torch.randn(37, 24),
    "decoder.layers.mlp.linear_fc1.weight": torch.randn(3, 20, 8).bfloat16(),
    "decoder.final_layernorm.weight": torch.randn(24),
}
OTHERS = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.randn(24)}


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes entries, tensors and other objects, as the weights of a checkpoint."""

    def write(entries: dict[str, Any], prefix: str = "", common: Any = None) -> Path:
        checkpoint = tmp_path / "step_00000002"
        (checkpoint / "weights").mkdir(parents=True, exist_ok=True)
        named = {prefix + name: entry for name, entry in entries.items()}
        whole = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        save(named, storage_writer=FileSystemWriter(checkpoint / "weights"), planner=whole, no_dist=True)
        # Megatron's writer does not note where it wrote, as torch's does.
        path = checkpoint / "weights" / ".metadata"
        path.write_bytes(pickle.dumps(dataclasses.replace(pickle.loads(path.read_bytes()), storage_meta=None)))
        torch.save({"iteration": 2} if common is None else common, checkpoint / "weights" / "common.pt")
        (checkpoint / "model.json").write_text(json.dumps({"step": 2}))
        return checkpoint

    return write


def in_two_shards(checkpoint: Path, name: str, first_rows: int) -> None:
    """Let two saved tensors ``NAME/0`` and ``NAME/1`` be the shards of one, as several ranks write it."""
    path = checkpoint / "weights" / ".metadata"
    content = pickle.loads(path.read_bytes())
    parts = [content.state_dict_metadata.pop(f"{name}/{number}") for number in (0, 1)]
    rest = parts[0].size[1:]
    chunks = [
        ChunkStorageMetadata(torch.Size((start, *[0] * len(rest))), part.size)
        for start, part in zip((0, first_rows), parts, strict=True)
    ]
    size = torch.Size((sum(part.size[0] for part in parts), *rest))
    content.state_dict_metadata[name] = TensorStorageMetadata(parts[0].properties, size, chunks)
    for number, chunk in enumerate(chunks):
        (index,) = [index for index in content.storage_data if index.fqn == f"{name}/{number}"]
        place = MetadataIndex(name, chunk.offsets, number)
        content.storage_data[place] = content.storage_data.pop(index)
    path.write_bytes(pickle.dumps(content))
