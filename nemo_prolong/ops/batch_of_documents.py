"""A row whose documents all have one length, seen as a batch: what lets FP8 attention run without a document mask.

Transformer Engine has no FP8 kernel for packed rows (``thd``), but it has one for batches with a causal mask. B
documents of L tokens, one after the other, are a batch of B sequences already. Token i of the row is token i mod L of
sequence i div L. That stays true on a context-parallel rank. Our partition gives it the chunks r and 2 * CP - 1 - r of
every document, both together before those of the next document. These are L / CP tokens a document. Transformer
Engine's exchanges want the chunks r and 2 * CP - 1 - r of every sequence of the batch, in the same order.

So with the batch dim first (``bshd``) the two are one memory layout and changing between them is a view. With the
sequence first (``sbhd``, Megatron's order) it is a transposition, and for more than one document a copy of queries,
keys, values and output.
"""

from __future__ import annotations

import torch

_LENGTH_TILE = 128
"""Tokens: the FP8 attention kernel of Hopper wants lengths that are multiples of this (before cuDNN 9.7)."""


def runs_in_fp8(documents: int | None, shard_tokens: int, context_parallel_size: int) -> bool:
    """Return whether the FP8 kernel takes a row; the same answer on every rank that shares it.

    Args:
        documents: Number of documents in the row if all have one length, else None.
        shard_tokens: Tokens of the row on this rank.
        context_parallel_size: Ranks that share the row. The ring also multiplies halves of a rank's part.
    """
    if documents is None:
        return False
    parts = 2 if context_parallel_size > 1 else 1
    return shard_tokens % (documents * parts * _LENGTH_TILE) == 0


def as_batch(packed: torch.Tensor, documents: int) -> torch.Tensor:
    """Return queries, keys or values [T, H, C] of equal documents as a batch [B, T / B, H, C], a view.

    Args:
        packed: T tokens of this rank.
        documents: B; divides T.
    """
    batch: torch.Tensor = packed.unflatten(0, (documents, -1))
    return batch
