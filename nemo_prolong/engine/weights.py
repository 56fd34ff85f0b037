"""Read weights from a distributed checkpoint, one tensor at a time.

Needs no model, no process group and no GPU: torch's own checkpoint reader gathers the shards of one tensor, whatever
tensor- or pipeline-parallel layout wrote them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_prolong.errors import CheckpointError


class CheckpointReader:
    """Names, shapes and tensors of the model in one checkpoint.

    Names are Megatron's without wrappers: ``embedding.word_embeddings.weight``,
    ``decoder.layers.self_attention.linear_qkv.weight`` (all layers stacked in dim 0), ``output_layer.weight``.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX`` that this software wrote. Its metadata is a pickle, so do
            not open a directory from anyone you do not trust.

    Raises:
        CheckpointError: If the directory holds no distributed checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.directory = checkpoint / "weights"
        try:
            metadata = FileSystemReader(self.directory).read_metadata()
        except OSError as error:
            raise CheckpointError(
                str(checkpoint),
                f"it holds no distributed checkpoint ({error}).",
                "Name a checkpoint directory such as runs/stage1/checkpoints/step_00005000.",
            ) from error
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self.wrapper_prefix = _wrapper_prefix(next(iter(tensors), ""))
        self._entries = {key.removeprefix(self.wrapper_prefix): (key, entry) for key, entry in tensors.items()}

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
        """Return the full tensor ``name``, gathered from its shards, on the CPU."""
        key, entry = self._entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        load_distributed({key: tensor}, storage_reader=FileSystemReader(self.directory), no_dist=True)
        return tensor


def _wrapper_prefix(key: str) -> str:
    """Return the ``module.`` repetitions that Megatron's wrappers put in front of a name."""
    prefix = ""
    while key.startswith("module.", len(prefix)):
        prefix += "module."
    return prefix
