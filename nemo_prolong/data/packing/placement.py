"""Best-fit-decreasing on counts of equal lengths: which row every document goes into.

Best fit puts a document into the row that the last one of its length went into, as long as there is room. So rows with
equal room take equal numbers of them, and one step serves all documents of a length and all rows with the same room.
A step uses up one or the other, which makes far fewer steps than documents.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WASTE = 0.0005
"""Share of a row that a patient placement lets go to waste without looking for a better end of the row."""


@dataclass(frozen=True)
class Placement:
    """Rows of documents that were placed from long to short.

    Attributes:
        row: Row of each document, int64 [D].
        num_rows: Rows.
        largest_room: Room in the emptiest of them, in tokens.
    """

    row: NDArray[np.int64]
    num_rows: int
    largest_room: int


def place(lengths: list[int], counts: list[int], seq_length: int, patient: bool) -> Placement:
    """Place documents, the longest first, each into the row with the least room that is enough.

    Rows of many documents of about one length end in a gap that even the shortest document does not fit. Patience
    avoids that: the last document of such a row is left out, and the row waits until documents of half its room come,
    of which two fill it. That pays where enough short documents follow, and costs rows where they do not.

    Args:
        lengths: Different lengths in descending order, each less than ``seq_length``.
        counts: How many documents have each.
        seq_length: Room of an empty row.
        patient: Let rows wait.
    """
    wasted = int(_WASTE * seq_length) if patient else seq_length
    open_rows = _OpenRows()
    num_rows = 0
    rows: list[int] = []
    steps: list[tuple[int, int]] = []
    for length, count in zip(lengths, counts, strict=True):
        open_rows.wake(length)
        while count:
            room = open_rows.least_room(length)
            per_row = min((room or seq_length) // length, count)
            gap = (room or seq_length) - per_row * length
            # A new row takes one document at least, else there would be no end of new rows.
            waits = wasted < gap < lengths[-1] <= (gap + length) // 2 and (per_row > 1 or room is not None)
            per_row -= waits
            if room is None:
                room, taken = seq_length, list(range(num_rows, num_rows + count // per_row))
                num_rows += len(taken)
            else:
                taken = open_rows.take(room, count // per_row if per_row else None)
            add = open_rows.wait if waits else open_rows.put
            add(room - per_row * length, taken)
            rows += taken
            steps.append((len(taken), per_row))
            count -= len(taken) * per_row
    taken_rows, per_row_counts = np.array(steps, np.int64).T
    row = np.repeat(np.array(rows, np.int64), np.repeat(per_row_counts, taken_rows))
    return Placement(row, num_rows, open_rows.largest_room())


class _OpenRows:
    """Rows that have room left, grouped by how much."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._rows: dict[int, list[int]] = {}
        # (minus half the room, room, rows): the least is the one that wakes first.
        self._waiting: list[tuple[int, int, list[int]]] = []

    def least_room(self, length: int) -> int | None:
        """Return the least room that is enough; None where no row has it."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else None

    def largest_room(self) -> int:
        """Return the room of the emptiest row, 0 where all are full."""
        return self._rooms[-1] if self._rooms else 0

    def take(self, room: int, count: int | None) -> list[int]:
        """Remove and return ``count`` rows with this room, or all if there are fewer or it is None."""
        group = self._rows[room]
        taken = group[-count:] if count else group[:]
        del group[len(group) - len(taken) :]
        if not group:
            del self._rows[room]
            del self._rooms[bisect_left(self._rooms, room)]
        return taken

    def put(self, room: int, rows: list[int]) -> None:
        """Add rows with this room; full ones are forgotten."""
        if room in self._rows:
            self._rows[room] += rows
        elif room:
            self._rows[room] = list(rows)
            insort(self._rooms, room)

    def wait(self, room: int, rows: list[int]) -> None:
        """Keep rows with this room back until two documents of half of it come."""
        heapq.heappush(self._waiting, (-(room // 2), room, rows))

    def wake(self, length: int) -> None:
        """Open the waiting rows that two documents of this length fit into."""
        while self._waiting and -self._waiting[0][0] >= length:
            _, room, rows = heapq.heappop(self._waiting)
            self.put(room, rows)
