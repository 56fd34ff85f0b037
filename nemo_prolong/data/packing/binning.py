"""Rows in which no document is cut: best-fit-decreasing on counts of equal lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from nemo_prolong.data.packing.arrays import count_up, stable_order
from nemo_prolong.data.packing.layout import Layout

TARGET_FILL = 0.999
"""Share of the rows that should be tokens."""
MAX_DROPPED_SHARE = 0.01
"""Most of all tokens that may be dropped to reach it."""


def best_fit(lengths: np.ndarray | Sequence[int], seq_length: int) -> Layout:
    """Put documents into rows without cutting them.

    A document longer than a row gives full rows first; what remains of it is placed like a document. The longest is
    placed first, each into the row with the least room that is enough for it. Rows may have fewer than ``seq_length``
    tokens; training pads them.

    Rows come in the order of their longest document (of equal ones the first), and begin with it. So the first rows
    are no sample of long or of short documents: a document's number says nothing of its length, while the order in
    which rows were opened goes from long to short.

    The emptiest row is dropped where rows are filled to less than ``TARGET_FILL`` with it and to no less without it,
    unless that loses more than ``MAX_DROPPED_SHARE`` of the tokens. No other row can be half empty: of two such rows
    the one opened later would have gone into the other.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        seq_length: Most tokens of a row.

    Returns:
        Rows. Dropped: ``underfilled_row``.
    """
    lengths = np.asarray(lengths, np.int64)
    assert np.all(lengths > 0)
    full_rows = lengths // seq_length
    left = lengths - full_rows * seq_length
    parts = np.flatnonzero(left)
    order, row = _place(left[parts], seq_length)
    parts = parts[order]
    num_full = int(full_rows.sum())
    full_document = np.repeat(np.arange(len(lengths), dtype=np.int64), full_rows)
    layout = Layout(
        np.concatenate([np.arange(num_full), num_full + _row_starts(row)]),
        document=np.concatenate([full_document, parts]),
        start=np.concatenate([count_up(full_rows), full_rows[parts]]) * seq_length,
        length=np.concatenate([np.full(num_full, seq_length, np.int64), left[parts]]),
        seq_length=seq_length,
        dropped_tokens={},
        dropped_documents={},
    )
    by_longest = stable_order(layout.document[layout.row_bounds[:-1]])
    return layout.keep_rows(by_longest[_worth_keeping(layout)[by_longest]], "underfilled_row")


def _place(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign documents shorter than a row to rows.

    Args:
        lengths: int64 [N].
        seq_length: Room of an empty row.

    Returns:
        ``order``, documents by row and from long to short in each, int64 [N]; and the row of each of these.
    """
    longest_first = stable_order(seq_length - lengths)
    descending = lengths[longest_first]
    first = np.flatnonzero(np.diff(descending, prepend=seq_length))
    counts = np.diff(first, append=len(descending))
    row = _place_counts(descending[first].tolist(), counts.tolist(), seq_length)
    by_row = stable_order(row)
    return longest_first[by_row], row[by_row]


def _place_counts(lengths: list[int], counts: list[int], seq_length: int) -> np.ndarray:
    """Return the row of every document; lengths descend, and documents of one length are alike.

    Best fit puts a document into the row that the last one of its length went into, as long as there is room. So
    rows with equal room take equal numbers of them, and one step serves all documents of a length and all rows with
    the same room. Each step uses up one or the other, which makes far fewer steps than documents.
    """
    open_rows = _OpenRows()
    num_rows = 0
    rows: list[int] = []
    steps: list[tuple[int, int]] = []
    for length, count in zip(lengths, counts, strict=True):
        while count:
            room = open_rows.least_room(length)
            per_row = min((room or seq_length) // length, count)
            wanted = count // per_row
            if room is None:
                room, taken = seq_length, list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            else:
                taken = open_rows.take(room, wanted)
            open_rows.put(room - per_row * length, taken)
            rows += taken
            steps.append((len(taken), per_row))
            count -= len(taken) * per_row
    taken_rows, per_row_counts = np.array(steps, np.int64).reshape(-1, 2).T
    return np.repeat(np.array(rows, np.int64), np.repeat(per_row_counts, taken_rows))


class _OpenRows:
    """Rows that have room left, grouped by how much."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._rows: dict[int, list[int]] = {}

    def least_room(self, length: int) -> int | None:
        """Return the least room that is enough; None where no row has it."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else None

    def take(self, room: int, count: int) -> list[int]:
        """Remove and return ``count`` rows with this room, fewer if there are fewer."""
        group = self._rows[room]
        taken = group[-count:]
        del group[-count:]
        if not group:
            del self._rows[room]
            del self._rooms[bisect_left(self._rooms, room)]
        return taken

    def put(self, room: int, rows: list[int]) -> None:
        """Add rows with this room; full rows are forgotten."""
        if not room:
            return
        if room in self._rows:
            self._rows[room] += rows
        else:
            self._rows[room] = list(rows)
            insort(self._rooms, room)


def _row_starts(row: np.ndarray) -> np.ndarray:
    """Return where each row begins in ascending row numbers, and their count; int64 [R+1]."""
    return np.append(np.flatnonzero(np.diff(row, prepend=-1)), len(row))


def _worth_keeping(layout: Layout) -> np.ndarray:
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
