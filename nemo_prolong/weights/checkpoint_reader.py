"""Read weights from a distributed checkpoint, one tensor or one layer of it at a time.

Needs no model, no process group and no GPU: torch's own checkpoint reader gathers the shards of what is asked for,
whatever tensor- or pipeline-parallel layout wrote them. Cost: one layer reads that layer's bytes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights.direct_reader import DirectReader
from nemo_prolong.weights.pickles import read_metadata


class CheckpointReader:
    """Names, shapes and tensors of the model in one checkpoint.

    Names are Megatron's without wrappers: ``embedding.word_embeddings.weight``,
    ``decoder.layers.self_attention.linear_qkv.weight`` (all layers stacked in dim 0), ``output_layer.weight``.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``. Nothing in it is executed.

    Raises:
        CheckpointError: If the directory holds no distributed checkpoint, or one that this software did not write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.directory = checkpoint / "weights"
        self._storage = DirectReader(self.directory)
        metadata = read_metadata(checkpoint)
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self.wrapper_prefix = _wrapper_prefix(next(iter(tensors), ""))
        self._entries = {key.removeprefix(self.wrapper_prefix): (key, entry) for key, entry in tensors.items()}
        self._layers: dict[tuple[str, int], TensorStorageMetadata] = {}

    def names(self) -> list[str]:
        """Return the names of all model tensors."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape of a tensor."""
        return tuple(self._entries[name][1].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype a tensor was saved in."""
        return self._entries[name][1].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return the full tensor ``name``, gathered from its shards, on the CPU.

        Raises:
            CheckpointError: If files of the checkpoint are missing.
        """
        shape = self.shape(name)
        return self._read_new(name, [0] * len(shape), shape)

    def read_layer(self, name: str, layer: int) -> torch.Tensor:
        """Return one layer of a tensor that is stacked over layers: entry ``layer`` of dim 0, on the CPU.

        Raises:
            CheckpointError: If files of the checkpoint are missing.
        """
        shape = self.shape(name)
        return self._read_new(name, [layer, *[0] * (len(shape) - 1)], [1, *shape[1:]])[0]

    def read_rows(self, name: str, start: int, rows: torch.Tensor, layer: int | None = None) -> None:
        """Fill ``rows`` with consecutive rows of a tensor, or of one layer of a stacked one.

        Args:
            name: The tensor.
            start: First row.
            rows: Destination on the CPU, of the tensor's dtype; its dim 0 says how many rows.
            layer: Entry of dim 0 where the tensor is stacked over layers.

        Raises:
            CheckpointError: If files of the checkpoint are missing.
        """
        offsets = [start, *[0] * (rows.dim() - 1)]
        if layer is None:
            self._read_region(name, offsets, rows)
        else:
            self._read_region(name, [layer, *offsets], rows[None])

    def _read_new(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        tensor = torch.empty(torch.Size(sizes), dtype=self.dtype(name))
        self._read_region(name, offsets, tensor)
        return tensor

    def _read_region(self, name: str, offsets: Sequence[int], tensor: torch.Tensor) -> None:
        """Fill ``tensor`` with the box at ``offsets`` of a tensor."""
        key, entry = self._entries[name]
        if tensor.dim() > 1 and len(tensor) == 1:
            entry = self._layer(name, offsets[0])
        box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape)
        items = create_read_items_for_chunk_list(key, entry, [box])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != tensor.numel():
            raise self._incomplete(name, f"{covered} of {tensor.numel()} elements are there")
        try:
            self._storage.read_data(LoadPlan(items), _IntoTensor(tensor)).wait()
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise self._incomplete(name, str(error).splitlines()[0]) from error

    def _layer(self, name: str, layer: int) -> TensorStorageMetadata:
        """Return the entry with only the chunks that hold a part of entry ``layer`` of dim 0.

        torch compares a box with every chunk of a tensor, and a layer is read in hundreds of boxes.
        """
        found = self._layers.get((name, layer))
        if found is None:
            entry = self._entries[name][1]
            chunks = [chunk for chunk in entry.chunks if 0 <= layer - chunk.offsets[0] < chunk.sizes[0]]
            found = self._layers[name, layer] = replace(entry, chunks=chunks)
        return found

    def _incomplete(self, name: str, found: str) -> CheckpointError:
        return CheckpointError(
            str(self.directory), f"the checkpoint does not hold all of {name} ({found}).", "Use another checkpoint."
        )


class _IntoTensor(DefaultLoadPlanner):
    """Copies what is read into one tensor, which stands for the region asked for.

    Args:
        tensor: Destination, of the region's sizes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of the destination that one saved chunk fills."""
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in spans)]


def _wrapper_prefix(key: str) -> str:
    """Return the ``module.`` repetitions that Megatron's wrappers put in front of a name."""
    prefix = ""
    while key.startswith("module.", len(prefix)):
        prefix += "module."
    return prefix
