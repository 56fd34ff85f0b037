"""Rows of consecutive documents: ``concat`` for short text, ``intact`` for conversations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import count_up
from nemo_prolong.data.packing.layout import Layout
from nemo_prolong.data.packing.targets import NO_TARGET, DocumentTargets


def concat(
    lengths: NDArray[np.int64] | Sequence[int], seq_length: int, targets: DocumentTargets | None = None
) -> Layout:
    """Cut the concatenated documents into rows; the rest of a document that a row cuts starts the next row.

    With targets, documents that have none are left out first. Then a row loses the pieces that were cut off so that
    they have none, and is shorter.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Tokens of a row.
        targets: Which tokens have a loss. None where all have.

    Returns:
        Rows in order, full ones without targets. Dropped: ``last_row``, the incomplete one, and ``no_target``.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    if targets is None:
        return _concat(lengths, seq_length)
    useful = np.flatnonzero(targets.totals())
    layout = _concat(lengths[useful], seq_length).among(useful, lengths, NO_TARGET)
    return layout.keep_pieces(targets.count(layout.document, layout.start, layout.length) > 0, NO_TARGET)


def _concat(lengths: NDArray[np.int64], seq_length: int) -> Layout:
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


def intact(
    lengths: NDArray[np.int64] | Sequence[int], seq_length: int, targets: DocumentTargets | None = None
) -> Layout:
    """Begin every row with the beginning of a document; the tail that a row cuts off is dropped.

    With targets, a document whose first target would be in the tail begins the next row, and the row before it is
    shorter. A document whose first target is beyond a whole row is left out.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Tokens of a row.
        targets: Which tokens have a loss. None where all have.

    Returns:
        Rows in order, full ones without targets. Dropped: ``truncated`` tails, the incomplete ``last_row`` and
        ``no_target``.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    if targets is None:
        return _intact(lengths, seq_length, np.zeros(len(lengths), np.int64))
    first = targets.first()
    useful = np.flatnonzero(first < np.minimum(lengths, seq_length))
    return _intact(lengths[useful], seq_length, first[useful]).among(useful, lengths, NO_TARGET)


def _intact(lengths: NDArray[np.int64], seq_length: int, needed: NDArray[np.int64]) -> Layout:
    """Return rows of whole documents, of which the last is cut only after its token ``needed`` [D]."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    bounds = _row_bounds(ends, starts, seq_length, needed)
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
    incomplete = layout.row_tokens()[-1:] < seq_length
    return layout.keep_rows(np.arange(layout.num_rows - int(incomplete.sum())), "last_row")


def _row_bounds(
    ends: NDArray[np.int64], starts: NDArray[np.int64], seq_length: int, needed: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the first document of every row of ``intact``, and the number of documents; int64 [R+1]."""
    # For every document the first one that a row begun with it does not hold. A row is then one step.
    row_ends = starts + seq_length
    last = np.searchsorted(ends, row_ends)
    following = np.minimum(last + 1, len(ends))
    cut = np.flatnonzero(last < len(ends))
    too_early = (starts + needed)[last[cut]] >= row_ends[cut]
    following[cut] -= too_early
    next_row = following.tolist()
    bounds = [0]
    while bounds[-1] < len(ends):
        bounds.append(next_row[bounds[-1]])
    return np.array(bounds, np.int64)
