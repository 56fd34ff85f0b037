"""Documents to rows of exactly ``seq_length`` tokens, with the spans of the documents in each row.

Three ways, those of ProLong's recipe. ``concat`` (short text): rows are consecutive pieces of the concatenated
documents; a document cut at the end of a row goes on in the next. ``intact`` (chat): every row begins with a document,
the cut tail is dropped. ``cut`` (long text): documents are cut to exact lengths first, the longest that fits first, and
the pieces are then packed with ``concat``.

Every token is accounted for: tokens in = tokens in rows + dropped tokens, by reason. Pure functions over numpy arrays;
cost is linear in the tokens, also for one huge document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stream:
    """Concatenated documents.

    Attributes:
        tokens: uint32 [T].
        bounds: int64 [D+1], ascending from 0 to T; document d is ``tokens[bounds[d]:bounds[d + 1]]``.
        mask: uint8 [T], 1 on targets; None where every token is one.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    mask: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [D]."""
        return np.diff(self.bounds)


@dataclass(frozen=True)
class PackedRows:
    """Rows and what did not get into one.

    Attributes:
        input_ids: uint32 [R, S].
        indices: R arrays uint32 [D, 2], (start, end) of each document in the row.
        mask: uint8 [R, S] or None.
        dropped_tokens: Reason to tokens.
    """

    input_ids: np.ndarray
    indices: list[np.ndarray]
    mask: np.ndarray | None
    dropped_tokens: dict[str, int]


def concatenate(documents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> Stream:
    """Return the documents as one stream; documents have at least one token."""
    lengths = np.array([len(document) for document in documents], np.int64)
    assert np.all(lengths > 0)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([np.empty(0, np.uint32), *documents]).astype(np.uint32)
    return Stream(tokens, bounds, None if masks is None else np.concatenate([np.empty(0, np.uint8), *masks]))


def pack_concat(stream: Stream, seq_length: int) -> PackedRows:
    """Cut the stream into rows; the incomplete last row is dropped as ``last_row``."""
    num_rows = len(stream.tokens) // seq_length
    starts = np.arange(num_rows, dtype=np.int64) * seq_length
    return _take_rows(stream, starts, seq_length, {"last_row": len(stream.tokens) - num_rows * seq_length})


def pack_intact(stream: Stream, seq_length: int) -> PackedRows:
    """Begin every row with a document; drop what a row cuts off (``truncated``) and the last row (``last_row``)."""
    starts, position, truncated = [], 0, 0
    while position + seq_length <= len(stream.tokens):
        starts.append(position)
        following = int(stream.bounds[np.searchsorted(stream.bounds, position + seq_length)])
        truncated += following - (position + seq_length)
        position = following
    dropped = {"truncated": truncated, "last_row": len(stream.tokens) - position}
    return _take_rows(stream, np.array(starts, np.int64), seq_length, dropped)


def cut(stream: Stream, document_lengths: Sequence[int]) -> tuple[dict[int, Stream], dict[str, int]]:
    """Cut documents into pieces of exactly the given lengths, the longest that fits first.

    Pieces come in turns: the first piece of every document, then the second of every document that has one. A row set
    cut short by ``max_rows`` then holds many documents rather than one.

    Args:
        stream: Documents; BOS and EOS are where the documents have them, a piece from the middle has none.
        document_lengths: Lengths of the pieces.

    Returns:
        Pieces by length, and dropped tokens: ``short_document`` (shorter than every length), ``remainder``.
    """
    starts, left = stream.bounds[:-1].copy(), stream.lengths.copy()
    smallest = min(document_lengths)
    short = int(left[left < smallest].sum())
    pieces = {}
    for length in sorted(set(document_lengths), reverse=True):
        counts = left // length
        number = _count_up(counts)
        document = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((document, number))
        pieces[length] = _gather(stream, (starts[document] + number * length)[order], length)
        starts += counts * length
        left -= counts * length
    return pieces, {"short_document": short, "remainder": int(left.sum()) - short}


def _count_up(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ..."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _gather(stream: Stream, starts: np.ndarray, length: int) -> Stream:
    bounds = np.arange(len(starts) + 1, dtype=np.int64) * length
    mask = None if stream.mask is None else _windows(stream.mask, starts, length).reshape(-1)
    return Stream(_windows(stream.tokens, starts, length).reshape(-1), bounds, mask)


def _windows(values: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return [R, length]: ``values`` from each start on."""
    if not len(starts):
        return np.empty((0, length), values.dtype)
    return np.lib.stride_tricks.sliding_window_view(values, length)[starts]


def _take_rows(stream: Stream, starts: np.ndarray, seq_length: int, dropped: dict[str, int]) -> PackedRows:
    return PackedRows(
        input_ids=_windows(stream.tokens, starts, seq_length),
        indices=list(_spans(stream.bounds, starts, seq_length)),
        mask=None if stream.mask is None else _windows(stream.mask, starts, seq_length),
        dropped_tokens=dropped,
    )


def _spans(bounds: np.ndarray, starts: np.ndarray, seq_length: int) -> Iterator[np.ndarray]:
    """Yield uint32 [D, 2] per row: the documents of the row, clipped to it."""
    first = np.searchsorted(bounds, starts, side="right")
    last = np.searchsorted(bounds, starts + seq_length, side="left")
    for start, inner, end in zip(starts.tolist(), first.tolist(), last.tolist(), strict=True):
        edges = np.concatenate([[0], bounds[inner:end] - start, [seq_length]])
        yield np.stack([edges[:-1], edges[1:]], axis=1).astype(np.uint32)
