"""The shapes that cuDNN's attention kernels are built for, out of those of a packed row.

Transformer Engine 2.9 builds a kernel graph for a number of document slots and of tokens, and keeps it for rows that
need no more (``get_max_batch_size`` and ``get_max_tokens`` in ``common/fused_attn/utils.cu``). Graphs are chosen by
these two, the longest document plays no part. Needs no torch.
"""

from __future__ import annotations

_FEWEST_SLOTS, _MOST_ROUNDED_SLOTS = 32, 512
_FEWEST_TOKENS, _TOKEN_STEP = 1024, 32_768


def kernel_documents(documents: int) -> int:
    """Return the document slots of the kernel for a row of so many documents, empty ones counted.

    >>> [kernel_documents(count) for count in (1, 32, 33, 512, 513)]
    [32, 32, 64, 512, 513]
    """
    if documents > _MOST_ROUNDED_SLOTS:
        return documents
    return max(_FEWEST_SLOTS, _power_of_two_from(documents))


def kernel_tokens(tokens: int) -> int:
    """Return the tokens that the kernel has room for, for so many on a rank.

    >>> [kernel_tokens(count) for count in (1, 1025, 32_768, 32_769, 65_537)]
    [1024, 2048, 32768, 65536, 98304]
    """
    if tokens > _TOKEN_STEP:
        return -(-tokens // _TOKEN_STEP) * _TOKEN_STEP
    return max(_FEWEST_TOKENS, _power_of_two_from(tokens))


def _power_of_two_from(count: int) -> int:
    return 1 << (count - 1).bit_length()
