"""Rows of pieces of exact lengths, cut from long documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.packing.arrays import count_up, stable_order
from nemo_prolong.data.packing.layout import Layout
from nemo_prolong.data.packing.targets import NO_TARGET, DocumentTargets


def split(
    lengths: NDArray[np.int64] | Sequence[int],
    document_lengths: Sequence[int],
    seq_length: int,
    targets: DocumentTargets | None = None,
) -> dict[int, Layout]:
    """Cut documents into pieces of exactly the given lengths, the longest that fits first, and fill rows with them.

    Pieces come in turns: the first piece of every document, then the second of every document that has one. A row set
    cut short by ``max_rows`` then holds many documents rather than a few long ones.

    Args:
        lengths: Tokens of each document, all positive, int64 [D].
        document_lengths: Lengths of the pieces; each divides ``seq_length``.
        seq_length: Tokens of a row.
        targets: Which tokens have a loss. Pieces without any are left out before rows are made. None where all have.

    Returns:
        Full rows by length of their pieces. No token is in two layouts. The incomplete ``last_row`` of each length is
        dropped, and with targets each piece that has ``no_target``. The layout of the smallest length also drops every
        ``short_document``, and the ``remainder`` of documents of which nothing long enough was left.
        ``dropped_documents`` counts per layout. A document of which every 64K piece is in an incomplete last row is
        dropped there, also if its 512K pieces are in rows.
    """
    lengths = np.asarray(lengths, np.int64)
    descending = sorted(set(document_lengths), reverse=True)
    assert np.all(lengths > 0) and all(seq_length % length == 0 for length in descending)
    left, layouts = lengths, {}
    for length in descending:
        counts = left // length
        document, number = _in_turns(counts)
        start = (lengths - left)[document] + number * length
        left = left - counts * length
        dropped_tokens, dropped_documents = _unfit(lengths, left, length) if length == descending[-1] else ({}, {})
        layout = Layout(
            np.arange(len(document) + 1, dtype=np.int64),
            document=document,
            start=start,
            length=np.full(len(document), length, np.int64),
            seq_length=seq_length,
            dropped_tokens=dropped_tokens,
            dropped_documents=dropped_documents,
        )
        if targets is not None:
            layout = layout.keep_pieces(targets.count(document, start, layout.length) > 0, NO_TARGET)
        layouts[length] = _in_rows(layout, seq_length // length)
    return layouts


def _in_rows(layout: Layout, pieces_per_row: int) -> Layout:
    """Return the pieces of a layout in full rows of so many."""
    pieces = len(layout.document)
    bounds = np.append(np.arange(0, pieces, pieces_per_row, dtype=np.int64), pieces)
    return replace(layout, row_bounds=bounds).keep_rows(np.arange(pieces // pieces_per_row), "last_row")


def _in_turns(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (document, number of the piece within it), int64 [F] each, of ``counts[d]`` pieces of every document."""
    number = count_up(counts)
    document = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    order = stable_order(number)
    return document[order], number[order]


def _unfit(lengths: NDArray[np.int64], left: NDArray[np.int64], smallest: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return dropped tokens and documents, given what is left of each document after the smallest length was cut."""
    short = lengths < smallest
    short_tokens = int(lengths[short].sum())
    tokens = {"short_document": short_tokens, "remainder": int(left.sum()) - short_tokens}
    return tokens, {"short_document": int(short.sum()), "remainder": 0}
