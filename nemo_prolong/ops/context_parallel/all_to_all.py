"""All-to-all (Ulysses, ``a2a``) gives every rank whole documents with H / CP of the heads.

One all-to-all carries queries, keys and values there, one carries the output back. The attention in between is plain
document attention of the padded row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_prolong.errors import ConfigError
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel.partition import DocumentPartition


class _AllToAll(torch.autograd.Function):
    """Slice i of rank j becomes slice j of rank i, [CP, ...]. Its own inverse, so its backward is itself."""

    @staticmethod
    def forward(ctx: Any, slices: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return _exchange(slices, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient, ctx.group), None


def heads_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    partition: DocumentPartition,
    group: dist.ProcessGroup | None,
    softmax_scale: float | None,
) -> torch.Tensor:
    """Return the output of this rank's queries [T, H, C]; query [T, H, C], key and value [T, K, C].

    Raises:
        ConfigError: If the heads of queries or of keys do not divide by the number of ranks.
    """
    size = partition.context_parallel_size
    heads = [x.size(1) for x in (query, key, value)]
    _check_heads(heads[0], heads[1], size)
    # [T, CP, (H + 2K) / CP, C]: the heads that one rank will compute lie together.
    by_rank = torch.cat([x.unflatten(1, (size, -1)) for x in (query, key, value)], dim=2)
    ranks = _all_to_all(by_rank.transpose(0, 1), group).flatten(0, 1)
    row = ranks.index_select(0, partition.rank_major_of_padded)
    row_query, row_key, row_value = row.split([count // size for count in heads], dim=1)
    output = document_attention(
        row_query, row_key, row_value, partition.cu_seqlens, softmax_scale, partition.max_seqlen
    )
    ranks = output.index_select(0, partition.padded_of_rank_major).unflatten(0, (size, -1))
    return _all_to_all(ranks, group).transpose(0, 1).flatten(1, 2)


def _all_to_all(slices: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return [CP, ...] with slice i of rank j as slice j of rank i; differentiable."""
    exchanged: torch.Tensor = _AllToAll.apply(slices, group)  # type: ignore[no-untyped-call]  # torch: untyped apply
    return exchanged


def _exchange(slices: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    slices = slices.contiguous()
    received = torch.empty_like(slices)
    dist.all_to_all_single(received, slices, group=group)
    return received


def _check_heads(query_heads: int, key_heads: int, context_parallel_size: int) -> None:
    if query_heads % context_parallel_size or key_heads % context_parallel_size:
        raise ConfigError(
            "parallelism.cp_comm_type=a2a",
            f"a2a gives every context-parallel rank a share of the heads, and {query_heads} query heads and "
            f"{key_heads} key-value heads per tensor-parallel rank do not both divide by "
            f"parallelism.context_parallel_size={context_parallel_size}.",
            "Set parallelism.cp_comm_type=p2p, which has no limit on heads.",
        )
