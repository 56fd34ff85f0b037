"""best_fit against best-fit-decreasing of one document at a time, and what it promises beyond that."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.packing import Layout, best_fit
from nemo_prolong.data.packing.arrays import stable_order
from nemo_prolong.data.packing.binning import MAX_DROPPED_SHARE, TARGET_FILL
from nemo_prolong.data.packing.placement import place

SEQ_LENGTH = 64
LENGTHS = st.lists(
    st.one_of(st.integers(1, SEQ_LENGTH), st.integers(1, 8), st.sampled_from([16, 21, 32]), st.integers(1, 300)),
    max_size=60,
)


SHORT_LENGTHS = st.lists(
    st.one_of(st.integers(1, SEQ_LENGTH - 1), st.integers(5, 24), st.sampled_from([16, 21, 32])),
    min_size=1,
    max_size=60,
)


def literal_row_tokens(lengths: list[int], seq_length: int) -> list[int]:
    """Return the tokens of the rows of best-fit-decreasing, one document at a time, in the order rows are opened."""
    rows = [seq_length for length in lengths for _ in range(length // seq_length)]
    for left in sorted((length % seq_length for length in lengths), reverse=True):
        fitting = [row for row, tokens in enumerate(rows) if tokens + left <= seq_length]
        if left and fitting:
            rows[max(fitting, key=lambda row: rows[row])] += left
        elif left:
            rows.append(left)
    return rows


def rows_of(layout: Layout) -> list[list[tuple[int, int, int]]]:
    """Return (document, start, length) of the pieces of every row."""
    pieces = list(zip(layout.document.tolist(), layout.start.tolist(), layout.length.tolist(), strict=True))
    return [pieces[begin:end] for begin, end in zip(layout.row_bounds[:-1], layout.row_bounds[1:], strict=True)]


def placed_tokens(lengths: list[int], patient: bool) -> list[int]:
    """Return the tokens of the rows of ``place``, in the order rows are opened."""
    values = sorted(set(lengths), reverse=True)
    placement = place(values, [lengths.count(value) for value in values], SEQ_LENGTH, patient)
    assert len(placement.row) == len(lengths)
    tokens = np.bincount(placement.row, weights=sorted(lengths, reverse=True)).astype(int).tolist()
    assert len(tokens) == placement.num_rows
    assert SEQ_LENGTH - min(tokens) == placement.largest_room
    return tokens


@given(SHORT_LENGTHS)
def test_placing_by_counts_fills_rows_like_placing_one_by_one(lengths: list[int]) -> None:
    assert sorted(placed_tokens(lengths, patient=False)) == sorted(literal_row_tokens(lengths, SEQ_LENGTH))


@given(SHORT_LENGTHS)
def test_a_patient_placement_overfills_no_row(lengths: list[int]) -> None:
    assert max(placed_tokens(lengths, patient=True)) <= SEQ_LENGTH


@given(LENGTHS)
def test_there_are_no_more_rows_than_by_placing_one_at_a_time(lengths: list[int]) -> None:
    layout = best_fit(lengths, SEQ_LENGTH)
    layout.validate(np.array(lengths, np.int64))
    assert layout.num_rows <= len(literal_row_tokens(lengths, SEQ_LENGTH))


def test_a_row_with_a_gap_waits_for_two_shorter_documents() -> None:
    # Four of 15 leave 4, which nothing fits; three leave 19, which two of 9 all but fill.
    lengths = [15] * 6 + [9] * 4
    assert placed_tokens(lengths, patient=False) == [60, 57, 9]
    assert placed_tokens(lengths, patient=True) == [63, 63]
    assert best_fit(lengths, SEQ_LENGTH).row_tokens().tolist() == [63, 63]


def test_patience_is_not_used_without_shorter_documents() -> None:
    lengths = [28] * 10 + [9]
    assert len(placed_tokens(lengths, patient=True)) > len(placed_tokens(lengths, patient=False)) == 6
    assert best_fit(lengths, SEQ_LENGTH).num_rows == 6


@given(LENGTHS)
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int]) -> None:
    layout = best_fit(lengths, SEQ_LENGTH)
    for row in rows_of(layout):
        for document, start, length in row:
            if lengths[document] <= SEQ_LENGTH:
                assert (start, length) == (0, lengths[document])
            elif length == SEQ_LENGTH:
                assert start % SEQ_LENGTH == 0
            else:
                assert (start, length) == (lengths[document] // SEQ_LENGTH * SEQ_LENGTH, lengths[document] % SEQ_LENGTH)


@given(LENGTHS)
def test_rows_begin_with_their_longest_piece(lengths: list[int]) -> None:
    rows = rows_of(best_fit(lengths, SEQ_LENGTH))
    assert [row[0][:2] for row in rows] == sorted(row[0][:2] for row in rows)
    for row in rows:
        # From long to short; among equal lengths by document.
        assert [(-length, document) for document, _, length in row] == sorted((-n, d) for d, _, n in row)


def test_the_first_rows_are_no_sample_of_long_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(1 + rng.lognormal(7, 1.2, 20_000).astype(np.int64), 65_536)
    layout = best_fit(lengths, 65_536)
    few = layout.first_rows(layout.num_rows // 4)
    everything = layout.sum_squared_lengths() / layout.num_tokens
    # Mean attention context per token of a quarter of the rows: rows in the order they were opened have 1.8 times it.
    assert few.sum_squared_lengths() / few.num_tokens == pytest.approx(everything, rel=0.1)


def test_documents_of_one_length_are_placed_in_their_order() -> None:
    assert rows_of(best_fit([4, 4, 8, 4, 4, 4], 8)) == [
        [(0, 0, 4), (1, 0, 4)],
        [(2, 0, 8)],
        [(3, 0, 4), (4, 0, 4)],
        [(5, 0, 4)],
    ]


def test_the_rest_of_a_long_document_shares_a_row() -> None:
    # 19 = 8 + 8 + 3; the rest shares a row with the document of 4, which is longer and so comes first.
    assert rows_of(best_fit([19, 4, 6], 8)) == [[(0, 0, 8)], [(0, 8, 8)], [(1, 0, 4), (0, 16, 3)], [(2, 0, 6)]]


def test_a_nearly_empty_row_among_full_ones_is_dropped() -> None:
    layout = best_fit([1000] * 200 + [3, 4], 1000)
    assert layout.num_rows == 200
    assert layout.fill == 1.0
    assert layout.dropped_tokens == {"underfilled_row": 7}
    assert layout.dropped_documents == {"underfilled_row": 2}


def test_the_dropped_rest_of_a_document_is_no_dropped_document() -> None:
    layout = best_fit([1000] * 200 + [1003], 1000)
    assert layout.dropped_tokens == {"underfilled_row": 3}
    assert layout.dropped_documents == {"underfilled_row": 0}


@pytest.mark.parametrize(
    ("lengths", "why"),
    [
        ([1000] * 5 + [900], "the row holds more than a hundredth of the tokens"),
        ([600] * 1000, "every row is as empty"),
        ([995] * 500 + [5], "the other rows are too empty as well"),
        ([1000] * 5000 + [700], "the fill is high enough with it"),
        ([3], "it is the only row"),
    ],
)
def test_no_row_is_dropped_where_that_does_not_help(lengths: list[int], why: str) -> None:
    layout = best_fit(lengths, 1000)
    assert layout.dropped_tokens == {"underfilled_row": 0}, why
    layout.validate(np.array(lengths))


@given(st.lists(st.integers(1, 500), max_size=400), st.sampled_from([512, 1024, 2048]))
def test_fill_is_reached_or_no_token_is_dropped(lengths: list[int], seq_length: int) -> None:
    layout = best_fit(lengths, seq_length)
    dropped = sum(layout.dropped_tokens.values())
    assert dropped <= MAX_DROPPED_SHARE * sum(lengths)
    assert layout.fill >= TARGET_FILL or not dropped


def test_real_looking_documents_fill_rows_to_a_thousandth() -> None:
    lengths = 600 + np.random.default_rng(1).lognormal(7.3, 0.9, 30_000).astype(np.int64)
    for seq_length in (65_536, 524_288):
        layout = best_fit(lengths, seq_length)
        layout.validate(lengths)
        assert layout.fill >= 0.999


@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**40)), max_size=50))
def test_the_order_by_sixteen_bits_is_the_stable_order(keys: list[int]) -> None:
    array = np.array(keys, np.int64)
    np.testing.assert_array_equal(stable_order(array), np.argsort(array, kind="stable"))
