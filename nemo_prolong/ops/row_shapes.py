"""Few shapes out of many rows: how many documents and tokens kernels are told of.

Transformer Engine builds a kernel graph of cuDNN for every number of documents above 512 and for every 32K tokens of a
rank (``config.rules.kernel_shapes``). Rows of short documents hardly ever agree in the first. Empty documents at the
end make few numbers of many. They have no token, so nothing is computed for them. Rows of few lengths also leave few
sizes to the allocator, and buffers that are exchanged keep theirs.
"""

from __future__ import annotations

_FEWEST_DOCUMENTS = 32
"""The slots that Transformer Engine's smallest kernel has."""

_MOST_DOCUMENTS = 8192
"""Transformer Engine 2.9's kernels for context parallelism copy the boundaries of a row to 48 KiB of shared memory.
That is room for 12,287 documents, and the next power of two would be refused."""

_STEPS_OF_A_ROW = 256
"""Padding that a row does not need is less than this part of it."""


def few_documents(documents: int) -> int:
    """Return the number of documents to describe a row with; what is missing are empty documents.

    >>> [few_documents(count) for count in (1, 33, 513, 9000)]
    [32, 64, 1024, 9000]
    """
    if documents > _MOST_DOCUMENTS:
        return documents
    return max(_FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())


def few_row_tokens(tokens: int, row_tokens: int, multiple: int) -> int:
    """Return the tokens of a row after padding.

    Args:
        tokens: Tokens of its padded documents.
        row_tokens: Tokens of every row of the stage. A row that fits gets exactly these.
        multiple: What the row must be a multiple of.

    >>> [few_row_tokens(count, 65_536, 16) for count in (1, 65_536, 65_537)]
    [65536, 65536, 65792]
    """
    if tokens <= row_tokens:
        return _rounded_up(row_tokens, multiple)
    return _rounded_up(tokens, _rounded_up(max(row_tokens // _STEPS_OF_A_ROW, 1), multiple))


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
