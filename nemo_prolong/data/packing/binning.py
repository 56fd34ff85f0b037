"""Rows in which no document is cut that fits into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import count_up, stable_order
from nemo_prolong.data.packing.layout import Layout
from nemo_prolong.data.packing.placement import place
from nemo_prolong.data.packing.targets import NO_TARGET, DocumentTargets

TARGET_FILL = 0.999
"""Share of the rows that should be tokens."""
MAX_DROPPED_SHARE = 0.01
"""Most of all tokens that the row dropped to reach it may hold."""


def best_fit(
    lengths: NDArray[np.int64] | Sequence[int], seq_length: int, targets: DocumentTargets | None = None
) -> Layout:
    """Put documents into rows without cutting them.

    A document longer than a row gives full rows first. What remains of it is placed like a document. The longest is
    placed first, each into the row with the least room that is enough for it. There are two ways to do this (see
    ``placement.place``), and the one with fewer rows is taken. Rows may have fewer than ``seq_length`` tokens. Training
    pads them.

    Rows come in the order of their longest document (of equal ones the first), and begin with it. So the first rows
    are no sample of long or of short documents: a document's number says nothing of its length, while the order in
    which rows were opened goes from long to short.

    Like the other ways of packing, this one may lose its last row: the emptiest row is dropped where the rows are
    filled to less than ``TARGET_FILL`` with it and to no less without it, and it has no more than
    ``MAX_DROPPED_SHARE`` of the tokens. Otherwise every row is kept, and ``fill`` says how full they are.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Most tokens of a row.
        targets: Which tokens have a loss. Pieces without any are left out before rows are made. None where all have.

    Returns:
        Rows. Dropped: ``underfilled_row``, and with targets ``no_target``.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    layout = _pieces(lengths, seq_length)
    if targets is not None:
        layout = layout.keep_pieces(targets.count(layout.document, layout.start, layout.length) > 0, NO_TARGET)
    is_full = layout.length == seq_length
    full, parts = np.flatnonzero(is_full), np.flatnonzero(~is_full)
    order, row = _place(layout.length[parts], seq_length)
    pieces = np.concatenate([full, parts[order]])
    layout = replace(
        layout,
        row_bounds=np.concatenate([np.arange(len(full)), len(full) + _row_starts(row)]),
        document=layout.document[pieces],
        start=layout.start[pieces],
        length=layout.length[pieces],
    )
    by_longest = stable_order(layout.document[layout.row_bounds[:-1]])
    return layout.keep_rows(by_longest[_worth_keeping(layout)[by_longest]], "underfilled_row")


def _pieces(lengths: NDArray[np.int64], seq_length: int) -> Layout:
    """Return the pieces of all documents, each in a row of its own: full rows, and last the rest where there is one."""
    pieces = -(-lengths // seq_length)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), pieces)
    start = count_up(pieces) * seq_length
    length = np.minimum(lengths[document] - start, seq_length)
    return Layout(np.arange(len(document) + 1, dtype=np.int64), document, start, length, seq_length, {}, {})


def _place(lengths: NDArray[np.int64], seq_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign documents shorter than a row to rows.

    Args:
        lengths: int64 [D].
        seq_length: Room of an empty row.

    Returns:
        ``order`` int64 [D], documents by row and from long to short in each, and the row of each of these.
    """
    if not len(lengths):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    longest_first = stable_order(seq_length - lengths)
    descending = lengths[longest_first]
    first = np.flatnonzero(np.diff(descending, prepend=seq_length))
    counts = np.diff(first, append=len(descending))
    placed = [place(descending[first].tolist(), counts.tolist(), seq_length, patient) for patient in (False, True)]
    # Of two that need as many rows, that with more of its waste in one row has the others fuller.
    row = min(placed, key=lambda placement: (placement.num_rows, -placement.largest_room)).row
    by_row = stable_order(row)
    return longest_first[by_row], row[by_row]


def _row_starts(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each row begins in ascending row numbers, and their count; int64 [R+1]."""
    return np.append(np.flatnonzero(np.diff(row, prepend=-1)), len(row))


def _worth_keeping(layout: Layout) -> NDArray[np.bool_]:
    """Return False for the emptiest row if it is to be dropped, else True; bool [R]."""
    keep = np.ones(layout.num_rows, bool)
    if not layout.num_rows or layout.fill >= TARGET_FILL:
        return keep
    tokens = layout.row_tokens()
    emptiest = int(np.argmin(tokens))
    left = layout.num_tokens - int(tokens[emptiest])
    small = tokens[emptiest] <= MAX_DROPPED_SHARE * layout.num_tokens
    keep[emptiest] = not (small and left >= TARGET_FILL * (layout.num_rows - 1) * layout.seq_length)
    return keep
