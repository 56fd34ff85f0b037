"""Document attention over context-parallel ranks, with one entry point for three communication types."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nemo_prolong.errors import ConfigError
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel.all_to_all import heads_attention
from nemo_prolong.ops.context_parallel.gather import GatherAttention
from nemo_prolong.ops.context_parallel.partition import DocumentPartition
from nemo_prolong.ops.context_parallel.ring import RingAttention

_EXCHANGES = {"p2p": RingAttention.apply, "all_gather": GatherAttention.apply, "a2a": heads_attention}


def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    partition: DocumentPartition,
    group: dist.ProcessGroup | None = None,
    comm_type: str = "p2p",
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Return causal attention inside documents of which every rank holds a shard.

    All ranks of the group call it together, with partitions of the same row.

    Args:
        query: Queries of this rank's shard [T, H, C], in the order of ``partition``, already rotated.
        key: Keys of the shard [T, K, C] with K dividing H.
        value: Values of the shard [T, K, C].
        partition: How the row is split, for this rank.
        group: The context-parallel process group, rank r of which holds shard r. The default group if None.
        comm_type: ``p2p`` (ring, least memory, transfers hidden behind computing), ``all_gather`` (two kernel calls
            more than one rank needs, however many ranks, but the whole row's keys and values on each) or ``a2a``
            (all-to-all, which is Ulysses).
        softmax_scale: Factor on the scores. ``C ** -0.5`` by default.

    Returns:
        Output of the shard's queries [T, H, C] in the dtype of ``query``.

    Raises:
        ConfigError: If ``comm_type`` is none of these, or is a2a and the heads do not divide by the ranks.
    """
    if comm_type not in _EXCHANGES:
        raise ConfigError(
            f"parallelism.cp_comm_type={comm_type}",
            f"the exchanges of the torch backend are {', '.join(_EXCHANGES)}.",
            "Set parallelism.cp_comm_type=p2p.",
        )
    assert query.size(0) == partition.shard_length, (query.shape, partition.shard_length)
    if partition.context_parallel_size == 1:
        return document_attention(query, key, value, partition.cu_seqlens, softmax_scale, partition.max_seqlen)
    place = dist.get_rank(group), dist.get_world_size(group)
    assert place == (partition.rank, partition.context_parallel_size), (place, partition)
    return _EXCHANGES[comm_type](query, key, value, partition, group, softmax_scale)
