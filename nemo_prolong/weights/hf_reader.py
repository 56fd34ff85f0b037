"""Read the tensors of a Hugging Face directory in Megatron's form, any rows of them, straight from safetensors.

No model, no process group. Cost: the bytes of the rows asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.names import pieces


class HuggingFaceReader:
    """Megatron's tensors out of a Hugging Face directory.

    Args:
        directory: The directory; its tensors were checked against ``model``.
        model: Sizes.
    """

    def __init__(self, directory: HuggingFaceDirectory, model: ModelConfig) -> None:
        self._directory = directory
        self._model = model
        self._pieces = {(piece.rule.megatron, piece.layer): piece for piece in pieces(model)}
        self._open: dict[Path, Any] = {}

    def fill(
        self, rows: torch.Tensor, name: str, layer: int | None = None, first_row: int = 0, first_column: int = 0
    ) -> None:
        """Fill ``rows`` with a part of a Megatron tensor, cast to its dtype. Rows that pad a vocabulary become zero.

        Args:
            rows: Destination [rows, columns], or [rows] for a norm.
            name: Megatron's name, such as ``decoder.layers.self_attention.linear_qkv.weight``.
            layer: Which layer, for a name under ``decoder.layers``.
            first_row: Row of the Megatron tensor (of one layer) that the first of ``rows`` is.
            first_column: The same for columns.
        """
        piece = self._pieces[name, layer]
        columns = [slice(first_column, first_column + rows.shape[1])] if rows.dim() > 1 else []
        filled = 0
        for source in piece.rule.row_ranges(self._model):
            start, end = max(source.start, first_row), min(source.end, first_row + len(rows))
            if start >= end:
                continue
            offset = source.part_start - source.start
            theirs = slice(offset + start, offset + end)
            part = self._tensor(piece.names[source.part])[(theirs, *columns)]
            rows[start - first_row : end - first_row].copy_(part)
            filled = end - first_row
        rows[filled:].zero_()

    def _tensor(self, name: str) -> Any:
        """Return a tensor of the directory that is read when it is indexed; safetensors has no type for it."""
        path = self._directory.file_of(name)
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(name)
