"""What the tests of attention share: random rows, dense attention to compare with, a watch on tensor sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

QUERY_HEADS, HEAD_DIMENSIONS = 4, 8


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_inputs(tokens: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return query, key and value as strided slices of one projection, the way Megatron hands them over."""
    generator = torch.Generator().manual_seed(tokens)
    heads = (QUERY_HEADS, key_heads, key_heads)
    fused = torch.randn(tokens, sum(heads), HEAD_DIMENSIONS, generator=generator, dtype=torch.float64).to(dtype)
    return [part.requires_grad_() for part in fused.split(heads, dim=1)]


def random_weights(tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the gradient of an output."""
    generator = torch.Generator().manual_seed(tokens + 1)
    return torch.randn(tokens, QUERY_HEADS, HEAD_DIMENSIONS, generator=generator, dtype=torch.float64).to(dtype)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of all tokens to all tokens, masked to the past of the own document, and its log-sum-exp."""
    group = query.size(1) // key.size(1)
    key, value = (torch.stack([x[:, head // group] for head in range(query.size(1))], dim=1) for x in (key, value))
    document = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    position = torch.arange(len(document))
    visible = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    scores = (torch.einsum("qhc,khc->hqk", query, key) * softmax_scale).masked_fill(~visible, -math.inf)
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), value), scores.logsumexp(-1)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
        return result
