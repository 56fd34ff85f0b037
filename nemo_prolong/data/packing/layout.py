"""A layout: the pieces of documents that make up every row, and what is in no row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import count_up


@dataclass(frozen=True)
class Layout:
    """Rows as pieces of documents.

    A piece is ``length`` consecutive tokens of one document, from ``start`` on. Documents are numbered as in the
    lengths that were packed. ``P`` pieces make ``R`` rows.

    Attributes:
        row_bounds: int64 [R+1], ascending from 0 to F; row r is pieces ``row_bounds[r]:row_bounds[r + 1]``.
        document: Document of each piece, int64 [F].
        start: First token of each piece in its document, int64 [F].
        length: Tokens of each piece, int64 [F].
        seq_length: Most tokens a row may have.
        dropped_tokens: Reason to tokens that are in no row.
        dropped_documents: Reason to documents of which nothing is in a row.
    """

    row_bounds: NDArray[np.int64]
    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    seq_length: int
    dropped_tokens: dict[str, int]
    dropped_documents: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.row_bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in rows."""
        return int(self.length.sum())

    @property
    def fill(self) -> float:
        """Share of the rows that is tokens, the rest being padding; 0 without rows."""
        return self.num_tokens / (self.num_rows * self.seq_length) if self.num_rows else 0.0

    def row_tokens(self) -> NDArray[np.int64]:
        """Return the tokens of each row, int64 [R]."""
        ends = np.concatenate([[0], np.cumsum(self.length)])
        return np.diff(ends[self.row_bounds])

    def sum_squared_lengths(self) -> int:
        """Return the sum of squared piece lengths: what attention within documents costs, in query-key pairs."""
        return int(np.square(self.length).sum())

    def first_rows(self, count: int) -> Layout:
        """Return the first ``count`` rows; the others are dropped as ``max_rows``."""
        return self if count >= self.num_rows else self.keep_rows(np.arange(count), "max_rows")

    def keep_rows(self, rows: NDArray[np.int64], reason: str) -> Layout:
        """Return the given rows in the given order; the others are dropped, and counted under ``reason``.

        Args:
            rows: Different row numbers, int64 [N].
            reason: A reason that has dropped nothing yet.
        """
        assert reason not in self.dropped_tokens
        pieces = np.diff(self.row_bounds)[rows]
        chosen = np.repeat(self.row_bounds[rows], pieces) + count_up(pieces)
        return self._with_pieces(chosen, pieces, reason)

    def keep_pieces(self, keep: NDArray[np.bool_], reason: str) -> Layout:
        """Return the layout without some pieces. They leave their rows shorter, and a row of them alone is gone.

        Args:
            keep: False for pieces that are dropped, bool [F].
            reason: What they are counted under.
        """
        pieces = np.diff(np.concatenate([[0], np.cumsum(keep)])[self.row_bounds])
        return self._with_pieces(np.flatnonzero(keep), pieces[pieces > 0], reason)

    def among(self, documents: NDArray[np.int64], lengths: NDArray[np.int64], reason: str) -> Layout:
        """Return a layout of some documents as one of all. The others are dropped.

        Args:
            documents: Those that were laid out, numbered among all, int64 [N].
            lengths: Of all documents, int64 [D].
            reason: What the others are counted under.
        """
        tokens = int(lengths.sum()) - int(lengths[documents].sum())
        return replace(
            self,
            document=documents[self.document],
            dropped_tokens=_added(self.dropped_tokens, reason, tokens),
            dropped_documents=_added(self.dropped_documents, reason, len(lengths) - len(documents)),
        )

    def _with_pieces(self, chosen: NDArray[np.int64], pieces: NDArray[np.int64], reason: str) -> Layout:
        """Return the layout of the chosen pieces [N], of which each row gets ``pieces`` [R] in turn."""
        tokens = self.num_tokens - int(self.length[chosen].sum())
        documents = self._documents() - _distinct(self.document[chosen])
        return replace(
            self,
            row_bounds=np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64),
            document=self.document[chosen],
            start=self.start[chosen],
            length=self.length[chosen],
            dropped_tokens=_added(self.dropped_tokens, reason, tokens),
            dropped_documents=_added(self.dropped_documents, reason, documents),
        )

    def _documents(self) -> int:
        return _distinct(self.document)

    def validate(self, lengths: NDArray[np.int64] | None = None) -> None:
        """Assert that pieces are within rows and apart from each other.

        Args:
            lengths: All documents, int64 [D]. With them, pieces must also be within documents, and every token
                accounted for.
        """
        assert self.row_bounds[0] == 0 and self.row_bounds[-1] == len(self.document)
        assert len(self.document) == len(self.start) == len(self.length)
        assert {a.dtype for a in (self.row_bounds, self.document, self.start, self.length)} == {np.dtype(np.int64)}
        assert np.all(np.diff(self.row_bounds) > 0) and np.all(self.length > 0) and np.all(self.start >= 0)
        assert np.all(self.row_tokens() <= self.seq_length)
        order = np.lexsort((self.start, self.document))
        document, start, end = self.document[order], self.start[order], (self.start + self.length)[order]
        assert np.all((document[1:] != document[:-1]) | (start[1:] >= end[:-1]))
        assert self.dropped_tokens.keys() == self.dropped_documents.keys()
        if lengths is not None:
            assert np.all(self.start + self.length <= lengths[self.document])
            assert self.num_tokens + sum(self.dropped_tokens.values()) == lengths.sum()
            assert self._documents() + sum(self.dropped_documents.values()) == len(lengths)


def _added(counts: dict[str, int], reason: str, count: int) -> dict[str, int]:
    return {**counts, reason: counts.get(reason, 0) + count}


def _distinct(documents: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(np.bincount(documents)))
