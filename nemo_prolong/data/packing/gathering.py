"""The tokens of a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import Value
from nemo_prolong.data.packing.layout import Layout


def gather(
    layout: Layout, row: int, tokens: NDArray[Value], bounds: NDArray[np.int64]
) -> tuple[NDArray[Value], NDArray[np.uint32]]:
    """Copy one row out of the tokens of all documents.

    A row of ``concat`` is one copy, however many documents it has (``copy_pieces``).

    Args:
        layout: The rows.
        row: Number of the row.
        tokens: uint32 [T], the documents one after another. They may be mapped from a file. Another array with one
            value per token, such as uint8 target masks, is gathered in the same way.
        bounds: int64 [D+1]; document d is ``tokens[bounds[d]:bounds[d + 1]]``.

    Returns:
        ``input_ids`` [N] and ``indices`` uint32 [F, 2]. ``input_ids`` is an array of its own with the dtype of
        ``tokens``. ``indices`` is the (start, end) of each piece in the row. Pieces of one document that meet stay
        apart.
    """
    pieces = slice(layout.row_bounds[row], layout.row_bounds[row + 1])
    length = layout.length[pieces]
    begin = bounds[layout.document[pieces]] + layout.start[pieces]
    edges = np.concatenate([[0], np.cumsum(length)])
    input_ids = copy_pieces(begin, length, tokens)
    return input_ids, np.stack([edges[:-1], edges[1:]], axis=1).astype(np.uint32)


def copy_pieces(begin: NDArray[np.int64], length: NDArray[np.int64], tokens: NDArray[Value]) -> NDArray[Value]:
    """Return pieces of an array one after another, in memory of their own.

    Pieces that continue one another are copied at once.

    Args:
        begin: First token of each piece, int64 [F].
        length: Tokens of each piece, positive int64 [F].
        tokens: [T], may be mapped from a file.

    Returns:
        [sum(length)], of the dtype of ``tokens``.
    """
    edges = np.concatenate([[0], np.cumsum(length)])
    first = np.flatnonzero(np.diff(begin - edges[:-1], prepend=-1))
    sources = begin[first].tolist()
    targets = [*edges[first].tolist(), int(edges[-1])]
    # A plain array: slicing a memory map makes a map object each time.
    tokens = np.asarray(tokens)
    copied = np.empty(targets[-1], tokens.dtype)
    for source, target, target_end in zip(sources, targets[:-1], targets[1:], strict=True):
        copied[target:target_end] = tokens[source : source + target_end - target]
    return copied
