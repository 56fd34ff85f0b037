"""Which tokens of a packed row belong to which context-parallel rank, by a zigzag in each document.

Every document is padded to a multiple of 2 * CP and cut into 2 * CP chunks. Rank r holds chunks r and 2 * CP - 1 - r.
Causal attention then costs every rank the same, as an early, cheap chunk comes with a late, expensive one. Padding
belongs to its document and comes after all of its tokens, so no token sees it.

Three orders of tokens appear here: the *row* as the data made it [S], the *padded row* [P], and *rank-major*: the
shards of all ranks one after the other [P]. Within a shard documents keep their order, each as its two chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_prolong.ops.attention import AttentionBlock
from nemo_prolong.ops.row_shapes import few_documents, few_row_tokens
from nemo_prolong.ops.transfer import to_device


@dataclass(frozen=True, eq=False)
class DocumentPartition:
    """How one row is split. It is made once per row and used by the data step and by the attention of every layer.

    Args:
        boundaries: Document boundaries of the row, int64 [D+1], from 0 to S.
        padded_boundaries: The same after padding, from 0 to P. A last document may be padding alone.
        context_parallel_size: Ranks that share the row.
        rank: The rank whose shard this is, 0 to ``context_parallel_size`` - 1.
        device: Where index tensors and split tensors live.
    """

    boundaries: NDArray[np.int64]
    padded_boundaries: NDArray[np.int64]
    context_parallel_size: int
    rank: int
    device: torch.device

    @classmethod
    def of_row(
        cls,
        cu_seqlens: torch.Tensor,
        context_parallel_size: int,
        rank: int,
        row_multiple: int | None = None,
        device: torch.device | str = "cpu",
        row_tokens: int | None = None,
    ) -> DocumentPartition:
        """Return the partition of a row.

        Args:
            cu_seqlens: Document boundaries, int [D+1], from 0 to S, on the CPU (elsewhere the host waits for them).
            context_parallel_size: Ranks that share the row.
            rank: Rank of this process among them.
            row_multiple: The padded row is extended to a multiple of this by one more document, all padding. It is a
                multiple of 2 * ``context_parallel_size``, its default.
            device: Where the shards will be.
            row_tokens: Tokens of every row of the stage. The padded row then is one of few lengths, with one of few
                numbers of documents (``ops.row_shapes``). None pads as little as can be.
        """
        assert 0 <= rank < context_parallel_size, (rank, context_parallel_size)
        unit = 2 * context_parallel_size
        multiple = unit if row_multiple is None else row_multiple
        assert multiple % unit == 0, f"a row of a multiple of {multiple} cannot be cut into {unit} chunks"
        boundaries = cu_seqlens.cpu().numpy().astype(np.int64)
        assert boundaries[0] == 0 and (np.diff(boundaries) >= 0).all(), boundaries
        padded = np.concatenate(([0], (-(np.diff(boundaries) // -unit) * unit).cumsum()))
        missing = -padded[-1] % multiple
        if row_tokens is not None:
            missing = few_row_tokens(int(padded[-1]), row_tokens, multiple) - padded[-1]
        if missing:
            boundaries = np.append(boundaries, boundaries[-1])
            padded = np.append(padded, padded[-1] + missing)
        if row_tokens is not None:
            boundaries, padded = with_empty_documents(boundaries), with_empty_documents(padded)
        return cls(boundaries, padded, context_parallel_size, rank, torch.device(device))

    @property
    def row_length(self) -> int:
        """Tokens of the padded row, P."""
        return int(self.padded_boundaries[-1])

    @property
    def shard_length(self) -> int:
        """Tokens of each rank, P / CP."""
        return self.row_length // self.context_parallel_size

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest padded document. It is an int, because Megatron caches RoPE tables by its value."""
        return int(np.diff(self.padded_boundaries).max(initial=0))

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Boundaries of the padded documents, int32 [D+1], of the whole row: what PackedSeqParams wants."""
        return to_device(torch.from_numpy(self.padded_boundaries.astype(np.int32)), self.device)

    @cached_property
    def chunk_lengths(self) -> NDArray[np.int64]:
        """Tokens of one chunk of each document, int64 [D]; 0 of an empty document."""
        return np.diff(self.padded_boundaries) // (2 * self.context_parallel_size)

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Where each document begins in every shard, int64 [D]."""
        return self.padded_boundaries[:-1] // self.context_parallel_size

    def split(self, row: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """Return this rank's tokens of ``row`` [..., S], as [..., T] on the partition's device.

        Args:
            row: One value per token in its last dim. What comes after the last document is left out.
            fill: Value of padding.
        """
        assert row.size(-1) >= self.boundaries[-1], (row.shape, int(self.boundaries[-1]))
        source = self._source.to(row.device)
        return to_device(row.index_select(-1, source.clamp(min=0)).masked_fill(source < 0, fill), self.device)

    def split_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the positions in the documents; those of padding run on.

        Args:
            position_ids: Integers [..., S].

        Returns:
            [..., T] in the dtype of ``position_ids``, on the partition's device.
        """
        padding = to_device(self._source < 0, self.device)
        running_on = to_device(self._positions, self.device).to(position_ids.dtype)
        return torch.where(padding, running_on, self.split(position_ids))

    def join(self, shards: torch.Tensor) -> torch.Tensor:
        """Return the row from the shards of all ranks, without padding. This is the inverse of ``split``.

        Args:
            shards: [CP, T, ...], rank r's shard at index r.

        Returns:
            [S, ...].
        """
        return shards.flatten(0, 1).index_select(0, self._rank_major_of_row.to(shards.device))

    @cached_property
    def rank_major_of_padded(self) -> torch.Tensor:
        """For every token of the padded row its place in rank-major order, int64 [P]."""
        lengths, size = np.diff(self.padded_boundaries), self.context_parallel_size
        chunk_length = np.repeat(self.chunk_lengths, lengths)
        offset = _offsets(lengths)
        chunk, within = np.divmod(offset, chunk_length)
        rank = np.minimum(chunk, 2 * size - 1 - chunk)
        local = np.repeat(self.shard_starts, lengths) + within + np.where(chunk >= size, chunk_length, 0)
        return to_device(torch.from_numpy(rank * self.shard_length + local), self.device)

    @cached_property
    def padded_of_rank_major(self) -> torch.Tensor:
        """For every token in rank-major order its place in the padded row, int64 [P]."""
        inverse = torch.empty_like(self.rank_major_of_padded)
        inverse[self.rank_major_of_padded] = torch.arange(self.row_length, device=self.device)
        return inverse

    @cached_property
    def own_block(self) -> AttentionBlock:
        """Queries of this rank to keys of this rank. Its two chunks together are a causal document."""
        twice = 2 * self.chunk_lengths
        return self._block(self.shard_starts, twice, self.shard_starts, twice, causal=True)

    @cached_property
    def block_of_earlier_rank(self) -> AttentionBlock:
        """Queries of this rank to keys of a lower rank. Both chunks see its first chunk, none its second."""
        chunk = self.chunk_lengths
        return self._block(self.shard_starts, 2 * chunk, self.shard_starts, chunk)

    @cached_property
    def block_of_later_rank(self) -> AttentionBlock:
        """Queries of this rank to keys of a higher rank. The second chunk sees both its chunks, the first none."""
        chunk = self.chunk_lengths
        return self._block(self.shard_starts + chunk, chunk, self.shard_starts, 2 * chunk)

    def block_of_rank(self, rank: int) -> AttentionBlock:
        """Return which of this rank's queries see which keys of the shard of ``rank``."""
        if rank == self.rank:
            return self.own_block
        return self.block_of_earlier_rank if rank < self.rank else self.block_of_later_rank

    @cached_property
    def blocks_of_padded_row(self) -> tuple[AttentionBlock, ...]:
        """Queries of this rank to the keys of the padded row. What precedes each chunk comes first, then the chunks."""
        chunk, size = self.chunk_lengths, self.context_parallel_size
        firsts = self.shard_starts, self.shard_starts + chunk
        documents = self.padded_boundaries[:-1]
        numbers = self.rank, 2 * size - 1 - self.rank
        before = [
            self._block(first, chunk, documents, number * chunk) for first, number in zip(firsts, numbers, strict=True)
        ]
        own_keys = np.concatenate([documents + number * chunk for number in numbers])
        twice = np.concatenate([chunk, chunk])
        return *before, self._block(np.concatenate(firsts), twice, own_keys, twice, causal=True)

    def _block(
        self,
        query_starts: NDArray[np.int64],
        query_lengths: NDArray[np.int64],
        key_starts: NDArray[np.int64],
        key_lengths: NDArray[np.int64],
        causal: bool = False,
    ) -> AttentionBlock:
        return AttentionBlock(query_starts, query_lengths, key_starts, key_lengths, causal, self.device)

    @cached_property
    def _shard_offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every token of this shard its document, and its offset in the padded document, int64 [T]."""
        lengths = 2 * self.chunk_lengths
        document = np.repeat(np.arange(len(lengths)), lengths)
        chunk_length = self.chunk_lengths[document]
        half, within = np.divmod(_offsets(lengths), chunk_length)
        chunk = np.where(half == 0, self.rank, 2 * self.context_parallel_size - 1 - self.rank)
        return document, chunk * chunk_length + within

    @cached_property
    def _positions(self) -> torch.Tensor:
        return torch.from_numpy(self._shard_offsets[1])

    @cached_property
    def _source(self) -> torch.Tensor:
        """For every token of this shard its place in the row, -1 of padding; int64 [T]."""
        document, offset = self._shard_offsets
        real = offset < np.diff(self.boundaries)[document]
        return torch.from_numpy(np.where(real, self.boundaries[document] + offset, -1))

    @cached_property
    def _rank_major_of_row(self) -> torch.Tensor:
        """For every token of the row its place in rank-major order, int64 [S]."""
        lengths = np.diff(self.boundaries)
        padded = np.repeat(self.padded_boundaries[:-1], lengths) + _offsets(lengths)
        return self.rank_major_of_padded[torch.from_numpy(padded).to(self.device)]


def with_empty_documents(boundaries: NDArray[Any]) -> NDArray[Any]:
    """Return document boundaries with empty documents at their end, so that rows have few numbers of documents.

    Args:
        boundaries: [D+1].
    """
    documents = len(boundaries) - 1
    return np.pad(boundaries, (0, few_documents(documents) - documents), mode="edge")


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 to length - 1 for each length, one after the other."""
    ends = lengths.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
