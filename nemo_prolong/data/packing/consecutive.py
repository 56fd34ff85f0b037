"""Rows of consecutive documents: ``concat`` for short text, ``intact`` for conversations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import count_up
from nemo_prolong.data.packing.layout import Layout


def concat(lengths: NDArray[np.int64] | Sequence[int], seq_length: int) -> Layout:
    """Cut the concatenated documents into rows; the rest of a document that a row cuts starts the next row.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Tokens of a row.

    Returns:
        Full rows in order. Dropped: ``last_row``, the incomplete one.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    first_row = starts // seq_length
    pieces = (ends - 1) // seq_length - first_row + 1
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    row = first_row[document] + count_up(pieces)
    begin = np.maximum(starts[document], row * seq_length)
    end = np.minimum(ends[document], (row + 1) * seq_length)
    full_rows, incomplete = divmod(int(lengths.sum()), seq_length)
    bounds = np.searchsorted(row, np.arange(full_rows + bool(incomplete) + 1))
    layout = Layout(bounds, document, begin - starts[document], end - begin, seq_length, {}, {})
    return layout.keep_rows(np.arange(full_rows), "last_row")


def intact(lengths: NDArray[np.int64] | Sequence[int], seq_length: int) -> Layout:
    """Begin every row with the beginning of a document; the tail that a row cuts off is dropped.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Tokens of a row.

    Returns:
        Full rows in order. Dropped: ``truncated`` tails and the incomplete ``last_row``.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    bounds = _row_bounds(ends, starts, seq_length)
    room = np.repeat(starts[bounds[:-1]] + seq_length, np.diff(bounds)) - starts
    kept = np.minimum(lengths, room)
    layout = Layout(
        bounds,
        document=np.arange(len(lengths), dtype=np.int64),
        start=np.zeros(len(lengths), np.int64),
        length=kept,
        seq_length=seq_length,
        dropped_tokens={"truncated": int((lengths - kept).sum())},
        dropped_documents={"truncated": 0},
    )
    return layout.keep_rows(np.flatnonzero(layout.row_tokens() == seq_length), "last_row")


def _row_bounds(ends: NDArray[np.int64], starts: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Return the first document of every row of ``intact``, and the number of documents; int64 [R+1]."""
    # For every document the one after the document that would complete a row begun with it. A row is then one step.
    following = np.minimum(np.searchsorted(ends, starts + seq_length) + 1, len(ends)).tolist()
    bounds = [0]
    while bounds[-1] < len(ends):
        bounds.append(following[bounds[-1]])
    return np.array(bounds, np.int64)
