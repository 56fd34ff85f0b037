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
from nemo_prolong.weights.names import Piece, pieces

_BLOCK_ROWS = 4096
"""Rows of a vocabulary that are summed at once: 256 MiB in float64 at a width of 8192."""


class HuggingFaceReader:
    """Megatron's tensors out of a Hugging Face directory.

    Where the model has a larger vocabulary than the directory, each new row is the mean of the directory's rows, summed
    in float64 in their order and rounded once. So it is the same on every rank of every layout.

    Args:
        directory: The directory; its tensors were checked against ``model``.
        model: Sizes.
    """

    def __init__(self, directory: HuggingFaceDirectory, model: ModelConfig) -> None:
        self._directory = directory
        self._theirs = directory.model_of(model)
        self._vocab_size = model.vocab_size
        self._pieces = {(piece.rule.megatron, piece.layer): piece for piece in pieces(self._theirs)}
        self._open: dict[Path, Any] = {}
        self._means: dict[str, torch.Tensor] = {}

    def fill(
        self, rows: torch.Tensor, name: str, layer: int | None = None, first_row: int = 0, first_column: int = 0
    ) -> dict[str, int]:
        """Fill ``rows`` with a part of a Megatron tensor, cast to its dtype. Rows that pad a vocabulary become zero.

        Args:
            rows: Destination [rows, columns], or [rows] for a norm.
            name: Megatron's name, such as ``decoder.layers.self_attention.linear_qkv.weight``.
            layer: Which layer, for a name under ``decoder.layers``.
            first_row: Row of the Megatron tensor (of one layer) that the first of ``rows`` is.
            first_column: The same for columns.

        Returns:
            How many of the values are NaN or infinite, by the name of their Hugging Face tensor. Empty if none is.
        """
        piece = self._pieces[name, layer]
        columns = [slice(first_column, first_column + rows.shape[1])] if rows.dim() > 1 else []
        filled = 0
        non_finite: dict[str, int] = {}
        for source in piece.rule.row_ranges(self._theirs):
            start, end = max(source.start, first_row), min(source.end, first_row + len(rows))
            if start >= end:
                continue
            offset = source.part_start - source.start
            theirs = slice(offset + start, offset + end)
            their_name = piece.names[source.part]
            destination = rows[start - first_row : end - first_row]
            destination.copy_(self._tensor(their_name)[(theirs, *columns)])
            count = count_non_finite(destination)
            if count:
                non_finite[their_name] = non_finite.get(their_name, 0) + count
            filled = end - first_row
        rows[self._fill_new_rows(rows, piece, first_row, columns, filled) :].zero_()
        return non_finite

    def _fill_new_rows(
        self, rows: torch.Tensor, piece: Piece, first_row: int, columns: list[slice], filled: int
    ) -> int:
        """Fill the rows of tokens that the directory has not; return the first row after them, or ``filled``."""
        if not piece.rule.is_vocabulary:
            return filled
        end = min(self._vocab_size - first_row, len(rows))
        if end > filled:
            rows[filled:end] = self._mean(piece.names[0])[columns[0]].to(rows.dtype)
        return max(end, filled)

    def _mean(self, name: str) -> torch.Tensor:
        """Return the mean of the rows of a tensor, float32 [columns]; read once."""
        if name not in self._means:
            tensor, num_rows = self._tensor(name), self._theirs.vocab_size
            total = torch.zeros(self._theirs.hidden_size, dtype=torch.float64)
            for start in range(0, num_rows, _BLOCK_ROWS):
                total += tensor[start : min(start + _BLOCK_ROWS, num_rows)].double().sum(dim=0)
            self._means[name] = (total / num_rows).float()
        return self._means[name]

    def _tensor(self, name: str) -> Any:
        """Return a tensor of the directory that is read when it is indexed; safetensors has no type for it."""
        path = self._directory.file_of(name)
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(self._directory.stored_name(name))


def count_non_finite(tensor: torch.Tensor) -> int:
    """Return how many values are NaN or infinite.

    The smallest and the largest value tell a good tensor. Both are NaN where there is one. That is one pass which
    writes nothing, 20 times as fast as a mask of what is finite.

    Args:
        tensor: Not empty.
    """
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())
