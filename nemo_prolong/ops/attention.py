"""Causal attention inside documents, for packed rows.

Owns the layout of packed attention (``thd``: tokens, heads, head dim) and never builds a [T, T] mask: documents of one
length become the batch of one fused causal attention. Cost: O(sum of squared document lengths) time, O(T) memory.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention in which every token sees its own document only.

    Args:
        query: Queries [T, H, C].
        key: Keys [T, K, C] with K dividing H (grouped-query attention).
        value: Values [T, K, C].
        cu_seqlens: Document boundaries, int32 [D+1], from 0 to T, non-decreasing; documents of length 0 are allowed.
        softmax_scale: Factor on the scores; ``C ** -0.5`` by default.

    Returns:
        Attention output [T, H, C] in the dtype of ``query``.
    """
    boundaries = cu_seqlens.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == query.size(0), (boundaries, query.shape)
    starts_by_length = _group_documents_by_length(boundaries)
    if len(starts_by_length) == 1:
        (length,) = starts_by_length
        return _attend(query, key, value, length, softmax_scale)
    positions = []
    outputs = []
    for length, starts in starts_by_length.items():
        index = (torch.tensor(starts).unsqueeze(1) + torch.arange(length)).flatten().to(query.device)
        positions.append(index)
        outputs.append(_attend(query[index], key[index], value[index], length, softmax_scale))
    return torch.empty_like(query).index_copy(0, torch.cat(positions), torch.cat(outputs))


def _group_documents_by_length(boundaries: list[int]) -> dict[int, list[int]]:
    """Return the start offsets of the documents of each length, in order of first appearance."""
    starts_by_length: dict[int, list[int]] = defaultdict(list)
    for start, end in pairwise(boundaries):
        if end > start:
            starts_by_length[end - start].append(start)
    return starts_by_length


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, softmax_scale: float | None
) -> torch.Tensor:
    """Return causal attention of consecutive documents that all have ``length`` tokens, [T, H, C]."""
    query_bhsc, key_bhsc, value_bhsc = (
        x.view(-1, length, x.size(1), x.size(2)).transpose(1, 2) for x in (query, key, value)
    )
    output = F.scaled_dot_product_attention(
        query_bhsc, key_bhsc, value_bhsc, is_causal=True, scale=softmax_scale, enable_gqa=query.size(1) != key.size(1)
    )
    return output.transpose(1, 2).reshape(query.shape)
