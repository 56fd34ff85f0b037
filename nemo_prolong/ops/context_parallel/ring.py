"""With ``p2p`` keys and values travel around the ring of ranks, one shard per step.

Before a rank computes with the shard it holds, it posts the send of that shard and the receive of the next, so that
they travel while it computes. Backward, the gradient of a shard follows one step behind the shard and is home after CP
steps. Whatever the number of ranks, one holds two shards of keys and values (the one it computes with and the next),
and backward three of their gradients (computed, leaving, arriving).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from nemo_prolong.ops.attention import attention_backward, empty_partial, merge_attention
from nemo_prolong.ops.attention_kernels import accumulation_dtype
from nemo_prolong.ops.context_parallel.partition import DocumentPartition

# Messages between the same two ranks are a shard, and the gradient that follows it.
_SHARD_TAG, _GRADIENT_TAG = 0, 1


@dataclass
class _Transfer:
    """A message to the next rank and one from the previous rank, both under way."""

    sent: torch.Tensor | None
    received: torch.Tensor | None
    requests: list[dist.Work]

    def wait(self) -> torch.Tensor:
        """Return what arrived, once. A finished transfer keeps neither message alive."""
        for request in self.requests:
            request.wait()
        received, self.sent, self.received, self.requests = self.received, None, None, []
        assert received is not None, "a transfer is waited for once"
        return received


class _Ring:
    """The ranks of a process group, each sending to the next."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pass_on(self, tensor: torch.Tensor, tag: int) -> _Transfer:
        """Start to send ``tensor`` to the next rank and to receive one like it from the previous."""
        received = torch.empty_like(tensor)
        following, previous = ((self.rank + step) % self.size for step in (1, -1))
        operations = [
            dist.P2POp(dist.isend, tensor, group=self._group, tag=tag, group_peer=following),
            dist.P2POp(dist.irecv, received, group=self._group, tag=tag, group_peer=previous),
        ]
        return _Transfer(tensor, received, dist.batch_isend_irecv(operations))

    def holder(self, step: int) -> int:
        """Return whose shard this rank holds in a step."""
        return (self.rank - step) % self.size


class RingAttention(torch.autograd.Function):
    """Attention of a shard of queries to the keys of all ranks, by a ring."""

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
        ring = _Ring(group)
        summed, lse = empty_partial(query)
        shard = torch.stack((key, value))
        for step in range(ring.size):
            transfer = ring.pass_on(shard, _SHARD_TAG) if step + 1 < ring.size else None
            block = partition.block_of_rank(ring.holder(step))
            merge_attention(summed, lse, query, shard[0], shard[1], block, softmax_scale)
            shard = transfer.wait() if transfer else shard
        output = summed.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.partition, ctx.group, ctx.softmax_scale = partition, group, softmax_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value, summed in ``accumulation_dtype`` on the way."""
        query, key, value, output, lse = ctx.saved_tensors
        ring, dtype = _Ring(ctx.group), accumulation_dtype(query.dtype)
        grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
        shard = torch.stack((key, value))
        following: _Transfer | None = None
        for step in range(ring.size):
            transfer = ring.pass_on(shard, _SHARD_TAG) if step + 1 < ring.size else None
            grad_shard = torch.zeros(shard.shape, dtype=dtype, device=shard.device)
            attention_backward(
                (grad_query, grad_shard[0], grad_shard[1]),
                *(grad_output, query, shard[0], shard[1], output, lse),
                ctx.partition.block_of_rank(ring.holder(step)),
                ctx.softmax_scale,
            )
            if following is not None:
                grad_shard += following.wait()
            following = ring.pass_on(grad_shard, _GRADIENT_TAG)
            shard = transfer.wait() if transfer else shard
        assert following is not None, "a ring has a rank"
        grad_key, grad_value = following.wait().to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None
