"""Stream a checkpoint into sharded safetensors with an index.

Every file's content is known from shapes alone before the first tensor is read, so tensors go from the checkpoint to
their place on disk one by one. Peak memory: the largest tensor of one layer, or the embedding, and its cast copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.names import pieces
from nemo_prolong.export.safetensors_file import TensorSpec, WrittenFile, write_safetensors
from nemo_prolong.export.source import Source
from nemo_prolong.files import write_json_atomically
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"


def plan_shards(model: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Return what goes into which file, in the order of writing.

    A file takes tensors until the next would make its data larger than ``max_shard_bytes``; a tensor that is larger by
    itself has a file of its own.
    """
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for piece in pieces(model):
        for spec in map(TensorSpec, piece.names, piece.shapes):
            size = spec.num_bytes(dtype)
            if shards[-1] and used + size > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(spec)
            used += size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_weights(source: Source, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, WrittenFile]:
    """Write all weights and their index into ``directory``.

    Returns:
        The safetensors files by name.

    Raises:
        ExportError: If a weight is NaN or infinite.
        CheckpointError: If files of the checkpoint are missing.
    """
    shards = plan_shards(source.model, dtype, max_shard_bytes)
    tensors = _finite_tensors(source, dtype)
    written = {}
    for name, specs in shards.items():
        started = time.monotonic()
        written[name] = write_safetensors(directory / name, specs, dtype, _take(tensors, len(specs)))
        seconds = time.monotonic() - started
        rate = format_bytes(round(written[name].num_bytes / max(seconds, 1e-9)))
        log.info("wrote %s  %s  %s/s", name, format_bytes(written[name].num_bytes), rate)
    _write_index(directory, shards, dtype)
    return written


def _take(tensors: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield next(tensors)


def _finite_tensors(source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the tensors in writing order; a model with NaN in it must not leave."""
    for name, tensor in source.hugging_face_tensors(dtype):
        # The extremes are NaN if any value is, and need no second tensor.
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise ExportError(
                f"run={source.run_dir}",
                f"{name} of {source.checkpoint.name} has NaN or infinity in it.",
                "Train again from a checkpoint before the loss went wrong; metrics.jsonl tells when.",
            )
        yield tensor


def _write_index(directory: Path, shards: dict[str, list[TensorSpec]], dtype: torch.dtype) -> None:
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    total_size = sum(spec.num_bytes(dtype) for specs in shards.values() for spec in specs)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json_atomically(directory / INDEX_FILE, index)
