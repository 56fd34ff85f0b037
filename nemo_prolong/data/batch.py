"""A packed row on its way to the model: as the data set makes it, as the loader hands it on, as one rank trains on it.

``PackedRow`` -> ``collate_rows`` -> ``PackedBatch`` -> ``packed_data_step`` -> ``RankBatch``.

All are frozen dataclasses. The loader's worker processes hand their tensors over in shared memory, as they would those
of a dict. NeMo passes a micro-batch on without looking into it, but its data steps take a tuple for what Lightning's
iterator yields, so a named tuple would lose all but its first field. The loader does not pin memory: torch pins what is
in dicts, tuples and lists, and of other classes only those with a method ``pin_memory``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_prolong.ops.context_parallel import DocumentPartition


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedRow:
    """One training sample, on the CPU.

    Attributes:
        tokens: int64 [S].
        labels: The token that each token predicts, int64 [S]; 0 where there is none.
        loss_mask: 1 where a token has a label, float32 [S].
        position_ids: Position in the document, int64 [S].
        cu_seqlens: Document boundaries, int32 [D+1]; the padding of a short row is its last document.
        domain: Where the text is from.
        real_tokens: Tokens without padding.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    domain: str
    real_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedBatch:
    """The micro-batch of one whole row, on the CPU.

    Attributes:
        tokens: int64 [1, S].
        labels: int64 [1, S].
        loss_mask: float32 [1, S].
        position_ids: int64 [1, S].
        cu_seqlens: Document boundaries, int32 [D+1].
        max_seqlen: Tokens of the longest document; an int, because Megatron caches RoPE tables by its value.
        domain: Where the text is from.
        real_tokens: Tokens without padding.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    domain: str
    real_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class RankBatch:
    """What one rank trains on: its tokens of a micro-batch, on its device, and what describes the whole row.

    Attributes:
        tokens: int64 [1, T].
        labels: int64 [1, T].
        loss_mask: float32 [1, T].
        position_ids: int64 [1, T].
        cu_seqlens: Document boundaries of the whole row, int32 [D+1]; where context-parallel ranks share the row, of
            the padded row. Documents at the end may be empty.
        max_seqlen: A power of two that no document is longer than; the bound that kernels and tables see.
        partition: Which tokens of the row are here; None where one rank has all of it.
        equal_documents: Number of documents if all have one length, padding counted and empty ones not; else None.
        domain: Where the text is from.
        row_tokens: Tokens of the whole row, S.
        real_tokens: Tokens of the whole row without padding.
        squared_tokens: Sum over the documents of the square of their tokens, without padding.
        data_wait_seconds: How long this rank waited for the row.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    partition: DocumentPartition | None
    equal_documents: int | None
    domain: str
    row_tokens: int
    real_tokens: int
    squared_tokens: int
    data_wait_seconds: float
