"""Where the targets of documents lie, so that no piece is put into a row that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

NO_TARGET = "no_target"
"""Reason of what is dropped because it has no token with a loss."""
_CHUNK_TOKENS = 2**22


@dataclass(frozen=True)
class DocumentTargets:
    """Target masks of documents, read in chunks where they lie.

    A mask has one value a token, nonzero on targets. A piece of a document is a document of its own in training. So
    its first token has no loss whatever the mask says, because no token before it predicts it.

    Attributes:
        open_mask: Returns the mask of a unit of storage, uint8 [T]. It may be mapped from a file.
        unit: Unit that holds each document, int64 [D].
        offset: First token of each document in its unit, int64 [D].
        lengths: Tokens of each document, int64 [D].
        chunk_tokens: Mask values that are looked at in one go, which bounds memory.
    """

    open_mask: Callable[[int], NDArray[np.uint8]] = field(repr=False)
    unit: NDArray[np.int64] = field(repr=False)
    offset: NDArray[np.int64] = field(repr=False)
    lengths: NDArray[np.int64] = field(repr=False)
    chunk_tokens: int = _CHUNK_TOKENS

    def count(
        self, document: NDArray[np.int64], start: NDArray[np.int64], length: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the tokens with a loss of each piece, int64 [F].

        Args:
            document: Document of each piece, int64 [F].
            start: First token of each piece in its document, int64 [F].
            length: Tokens of each piece, positive int64 [F].
        """
        counts = np.zeros(len(document), np.int64)
        for number, mine in self._by_unit(document):
            begin = self.offset[document[mine]] + start[mine]
            ends = np.concatenate([begin + 1, begin + length[mine]])
            before_begin, before_end = self._counts_before(self.open_mask(number), ends).reshape(2, -1)
            counts[mine] = before_end - before_begin
        return counts

    def totals(self) -> NDArray[np.int64]:
        """Return the tokens with a loss of each document as a whole, int64 [D]."""
        return self.count(np.arange(len(self.lengths)), np.zeros(len(self.lengths), np.int64), self.lengths)

    def first(self) -> NDArray[np.int64]:
        """Return the position of the first token with a loss in each document, or its length without one; int64 [D]."""
        found = np.zeros(len(self.lengths), np.int64)
        for number, mine in self._by_unit(np.arange(len(self.lengths))):
            begin = self.offset[mine]
            found[mine] = self._next_targets(self.open_mask(number), begin + 1) - begin
        return np.minimum(found, self.lengths)

    def of(self, documents: NDArray[np.int64]) -> DocumentTargets:
        """Return the targets of some documents, int64 [N], which are numbered anew."""
        return DocumentTargets(
            self.open_mask, self.unit[documents], self.offset[documents], self.lengths[documents], self.chunk_tokens
        )

    def _by_unit(self, document: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield every unit, and which of the given documents are in it."""
        units = self.unit[document]
        order = np.argsort(units, kind="stable")
        numbers, first = np.unique(units[order], return_index=True)
        yield from zip(numbers.tolist(), np.split(order, first[1:]), strict=bool(len(numbers)))

    def _counts_before(self, mask: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many targets stand before each position of a mask, int64 [N]."""
        order = np.argsort(positions, kind="stable")
        ascending, counts, before = positions[order], np.zeros(len(positions), np.int64), 0
        for begin in range(0, len(mask), self.chunk_tokens):
            chunk = np.asarray(mask[begin : begin + self.chunk_tokens]) != 0
            inside = slice(*np.searchsorted(ascending, [begin, begin + len(chunk)], side="right"))
            running = np.cumsum(chunk, dtype=np.int64)
            counts[order[inside]] = before + running[ascending[inside] - begin - 1]
            before += int(running[-1])
        return counts

    def _next_targets(self, mask: NDArray[np.uint8], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first target at or after each position of a mask, or the end of the mask; int64 [N]."""
        order = np.argsort(positions, kind="stable")
        ascending, following = positions[order], len(mask)
        found = np.full(len(positions), len(mask), np.int64)
        for begin in reversed(range(0, len(mask), self.chunk_tokens)):
            chunk = np.asarray(mask[begin : begin + self.chunk_tokens]) != 0
            targets = np.append(begin + np.flatnonzero(chunk), following)
            inside = slice(*np.searchsorted(ascending, [begin, begin + self.chunk_tokens]))
            found[order[inside]] = targets[np.searchsorted(targets, ascending[inside])]
            following = int(targets[0])
        return found
