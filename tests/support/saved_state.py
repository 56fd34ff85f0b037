"""The tensors of a distributed checkpoint, gathered by torch alone; none of the reader that the engine uses."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_distributed

MASTERS = "optimizer.state.fp32_param"
"""fp32 weights that the optimizer keeps."""


def read_tensors(weights: Path, part: str) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a part of a checkpoint by model name: module, optimizer.state.exp_avg, ...

    Args:
        weights: The directory ``weights`` of a checkpoint.
        part: What their keys begin with.
    """
    metadata = FileSystemReader(weights).read_metadata()
    prefix = "module." if part == "module" else f"{part}.module."
    saved = {
        key: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and hasattr(entry, "size")
    }
    load_distributed(saved, storage_reader=FileSystemReader(weights), no_dist=True)
    whole = {}
    for key, value in saved.items():
        shape = metadata.mcore_data.get(key, {}).get("nd_reformulated_orig_global_shape")
        name = key.removeprefix(prefix)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        whole[name] = value if shape is None else _from_runs(value, shape)
    return whole


def _from_runs(saved: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that Megatron saved as [boxes in dim 0, boxes in dim 1, ..., elements of a box]."""
    boxes = saved.shape[:-1]
    box = [size // number for size, number in zip(shape, boxes, strict=True)]
    dims = len(shape)
    places = [place for dim in range(dims) for place in (dim, dims + dim)]
    return saved.view(*boxes, *box).permute(places).reshape(shape)
