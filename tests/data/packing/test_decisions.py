"""Decisions within packing, each at its boundary."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_prolong.data.packing import Layout, best_fit, binning
from nemo_prolong.data.packing.arrays import stable_order
from nemo_prolong.data.packing.gathering import copy_pieces
from nemo_prolong.data.packing.placement import place


def layout_of(row_tokens: list[int], seq_length: int) -> Layout:
    """Rows of one document each."""
    rows = len(row_tokens)
    return Layout(
        np.arange(rows + 1, dtype=np.int64),
        np.arange(rows, dtype=np.int64),
        np.zeros(rows, np.int64),
        np.array(row_tokens, np.int64),
        seq_length,
        {},
        {},
    )


@pytest.mark.parametrize(
    ("row_tokens", "seq_length", "share", "kept"),
    [
        ([8, 4], 8, 0.5, [True, True]),  # filled enough, and no more than enough
        ([8, 2], 8, 0.5, [True, False]),
        ([2, 8], 8, 0.5, [False, True]),
        ([5, 2], 8, 0.5, [True, True]),  # too empty without it too
        ([6, 1], 8, 0.5, [True, False]),  # just enough without it
        ([9, 3], 9, 0.25, [True, False]),  # just the share that may be lost
        ([9, 4], 9, 0.25, [True, True]),
    ],
)
def test_the_emptiest_row_is_dropped_where_that_fills_the_others(
    row_tokens: list[int], seq_length: int, share: float, kept: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binning, "TARGET_FILL", 0.75)
    monkeypatch.setattr(binning, "MAX_DROPPED_SHARE", share)
    assert binning._worth_keeping(layout_of(row_tokens, seq_length)).tolist() == kept


def test_of_two_ways_with_as_many_rows_the_fuller_rows_are_taken() -> None:
    layout = best_fit([94, 91, 73, 42, 25, 9], 100)
    assert layout.row_tokens().tolist() == [94, 100, 98, 42]  # and not 94, 100, 73, 67


@pytest.mark.parametrize(
    ("lengths", "counts", "row"),
    [
        ([1999, 5], [2, 4], [0, 0, 1, 1, 1, 1]),  # 2 tokens of 4,000 are little enough to go to waste
        ([1997, 6], [2, 1], [0, 0, 0]),  # the shortest fills the gap
    ],
)
def test_a_row_does_not_wait_for_nothing(lengths: list[int], counts: list[int], row: list[int]) -> None:
    assert place(lengths, counts, 4000, patient=True).row.tolist() == row


def test_each_piece_is_a_row_before_rows_are_made() -> None:
    lengths = np.array([5, 8, 17], np.int64)
    layout = binning._pieces(lengths, 8)
    assert layout.row_tokens().tolist() == [5, 8, 8, 8, 1]
    layout.validate(lengths)


@pytest.mark.parametrize("low", [2**16, 2**32, 2**48])
def test_large_keys_are_sorted_by_all_of_their_bits(low: int) -> None:
    assert stable_order(np.array([low, 1, low, 0], np.int64)).tolist() == [3, 1, 0, 2]


def test_pieces_that_only_seem_to_go_on_are_copied_apart() -> None:
    # With other tokens each time, memory of the time before cannot look right.
    for first, begin, length in ((100, [10, 5], [5, 3]), (200, [1, 7], [2, 2]), (300, [1, 7], [2, 2])):
        tokens = np.arange(first, first + 20)
        expected = [first + b + n for b, count in zip(begin, length, strict=True) for n in range(count)]
        assert copy_pieces(np.array(begin), np.array(length), tokens).tolist() == expected


def test_pieces_of_a_document_may_meet_and_not_overlap() -> None:
    def of(starts: list[int]) -> Layout:
        pieces = len(starts)
        bounds, same = np.arange(pieces + 1, dtype=np.int64), np.zeros(pieces, np.int64)
        return Layout(bounds, same, np.array(starts, np.int64), np.full(pieces, 4, np.int64), 8, {}, {})

    of([0, 4, 8]).validate()
    with pytest.raises(AssertionError):
        of([0, 3]).validate()
