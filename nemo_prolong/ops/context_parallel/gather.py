"""With ``all_gather`` every rank gathers the keys and values of all ranks and attends its own queries to them.

It is simple and quick for short rows. Keys and values of the whole row are on every rank while a layer computes. They
are gathered again in the backward pass instead of kept, so that what a layer saves stays the shard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_prolong.ops.attention import attention_backward, empty_partial, merge_attention
from nemo_prolong.ops.attention_kernels import accumulation_dtype
from nemo_prolong.ops.context_parallel.partition import DocumentPartition

# torch 2.13 renamed both. Older releases know the second name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GatherAttention(torch.autograd.Function):
    """Attention of a shard of queries to the gathered keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        partition: DocumentPartition,
        group: dist.ProcessGroup | None,
        softmax_scale: float | None,
    ) -> torch.Tensor:
        """Return the output of this rank's queries [T, H, C]; query [T, H, C], key and value [T, K, C]."""
        row_key, row_value = _gather_row(key, value, partition, group)
        summed, lse = empty_partial(query)
        for block in partition.blocks_of_padded_row:
            merge_attention(summed, lse, query, row_key, row_value, block, softmax_scale)
        output = summed.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.partition, ctx.group, ctx.softmax_scale = partition, group, softmax_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value, summed in ``accumulation_dtype`` over the ranks."""
        query, key, value, output, lse = ctx.saved_tensors
        row_key, row_value = _gather_row(key, value, ctx.partition, ctx.group)
        dtype = accumulation_dtype(query.dtype)
        grad_query, grad_row_key, grad_row_value = (
            torch.zeros(x.shape, dtype=dtype, device=query.device) for x in (query, row_key, row_value)
        )
        gradients = grad_query, grad_row_key, grad_row_value
        for block in ctx.partition.blocks_of_padded_row:
            attention_backward(gradients, grad_output, query, row_key, row_value, output, lse, block, ctx.softmax_scale)
        grad_key, grad_value = _scatter_row(grad_row_key, grad_row_value, ctx.partition, ctx.group).to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None


def _gather_row(
    key: torch.Tensor, value: torch.Tensor, partition: DocumentPartition, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of the padded row [P, K, C] from the shards [T, K, C] of all ranks."""
    shard = torch.stack((key, value), dim=1)
    ranks = shard.new_empty((partition.row_length, *shard.shape[1:]))
    _all_gather(ranks, shard, group=group)
    row_key, row_value = (ranks[:, part].index_select(0, partition.rank_major_of_padded) for part in (0, 1))
    return row_key, row_value


def _scatter_row(
    grad_key: torch.Tensor, grad_value: torch.Tensor, partition: DocumentPartition, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return this rank's part [2, T, K, C] of the gradients [P, K, C] summed over the ranks."""
    ranks = torch.stack((grad_key, grad_value), dim=1).index_select(0, partition.padded_of_rank_major)
    shard = ranks.new_empty((partition.shard_length, *ranks.shape[1:]))
    _reduce_scatter(shard, ranks, group=group)
    return shard.transpose(0, 1)
