"""concat, intact and split against literal implementations, token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.packing import Layout, best_fit, concat, intact, split

LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 200)), max_size=40)
SEQ_LENGTHS = st.integers(1, 64)
TARGETS = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=1, max_size=4)
Rows = list[list[list[int]]]
"""Tokens of the pieces of every row; all tokens of all documents are numbered through, so none is like another."""


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Return the tokens of every document."""
    ends = np.cumsum(lengths, dtype=int).tolist()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def unpack(layout: Layout, lengths: list[int]) -> Rows:
    """Return the tokens that a layout puts into its rows."""
    documents = documents_of(lengths)
    pieces = [
        documents[document][start : start + length]
        for document, start, length in zip(layout.document, layout.start, layout.length, strict=True)
    ]
    return [pieces[begin:end] for begin, end in zip(layout.row_bounds[:-1], layout.row_bounds[1:], strict=True)]


def tokens_of(rows: Rows) -> list[int]:
    return [token for row in rows for piece in row for token in piece]


def literal_concat(lengths: list[int], seq_length: int) -> Rows:
    """Move tokens one at a time; a row that is full is put away."""
    rows: Rows = []
    row: list[list[int]] = []
    room = seq_length
    for document in documents_of(lengths):
        row.append([])
        for token in document:
            if not room:
                rows.append([piece for piece in row if piece])
                row, room = [[]], seq_length
            row[-1].append(token)
            room -= 1
    if row and not room:
        rows.append(row)
    return rows


def literal_intact(lengths: list[int], seq_length: int) -> Rows:
    """Put whole documents into a row until it is full, and cut what hangs over."""
    rows: Rows = []
    row: list[list[int]] = []
    for document in documents_of(lengths):
        row.append(document[: seq_length - sum(map(len, row))])
        if sum(map(len, row)) == seq_length:
            rows.append(row)
            row = []
    return rows


def literal_split(lengths: list[int], targets: list[int], seq_length: int) -> dict[int, Rows]:
    """Cut pieces off the documents, the longest that fits first; then deal them out in turns."""
    cut: dict[int, list[list[list[int]]]] = {target: [] for target in targets}
    for document in documents_of(lengths):
        for target in sorted(cut, reverse=True):
            cut[target].append([])
            while len(document) >= target:
                cut[target][-1].append(document[:target])
                document = document[target:]
    rows = {}
    for target, per_document in cut.items():
        turns = range(max(map(len, per_document), default=0))
        pieces = [pieces[turn] for turn in turns for pieces in per_document if turn < len(pieces)]
        n = seq_length // target
        rows[target] = [pieces[i : i + n] for i in range(0, len(pieces) - n + 1, n)]
    return rows


@given(LENGTHS, SEQ_LENGTHS)
def test_concat_does_what_moving_tokens_one_by_one_does(lengths: list[int], seq_length: int) -> None:
    layout = concat(lengths, seq_length)
    layout.validate(np.array(lengths, np.int64))
    rows = unpack(layout, lengths)
    assert rows == literal_concat(lengths, seq_length)
    assert tokens_of(rows) == list(range(len(tokens_of(rows))))
    assert 0 <= layout.dropped_tokens["last_row"] < seq_length
    assert np.all(layout.row_tokens() == seq_length)


@given(LENGTHS, SEQ_LENGTHS)
def test_intact_fills_rows_with_whole_documents(lengths: list[int], seq_length: int) -> None:
    layout = intact(lengths, seq_length)
    layout.validate(np.array(lengths, np.int64))
    assert unpack(layout, lengths) == literal_intact(lengths, seq_length)
    assert np.all(layout.start == 0)
    assert np.all(layout.row_tokens() == seq_length)


@given(LENGTHS, TARGETS)
def test_split_does_what_cutting_documents_one_by_one_does(lengths: list[int], targets: list[int]) -> None:
    layouts = split(lengths, targets, 24)
    assert {target: unpack(layout, lengths) for target, layout in layouts.items()} == literal_split(
        lengths, targets, 24
    )


@given(LENGTHS, TARGETS)
def test_split_uses_no_token_twice_and_counts_the_others_once(lengths: list[int], targets: list[int]) -> None:
    layouts = split(lengths, targets, 24)
    used = [token for layout in layouts.values() for token in tokens_of(unpack(layout, lengths))]
    assert len(set(used)) == len(used)
    assert len(used) + sum(sum(layout.dropped_tokens.values()) for layout in layouts.values()) == sum(lengths)
    smallest = layouts[min(targets)]
    short = [length for length in lengths if length < min(targets)]
    assert smallest.dropped_tokens["short_document"] == sum(short)
    assert smallest.dropped_documents["short_document"] == len(short)
    assert all(set(layouts[target].dropped_tokens) == {"last_row"} for target in targets if target != min(targets))
    for target, layout in layouts.items():
        layout.validate()
        assert set(layout.length.tolist()) <= {target}
        assert np.all(layout.row_tokens() == 24)


@given(LENGTHS, TARGETS)
def test_a_document_begins_once_in_all_split_layouts(lengths: list[int], targets: list[int]) -> None:
    layouts = split(lengths, targets, 24)
    begins = np.concatenate([layout.document[layout.start == 0] for layout in layouts.values()])
    assert len(np.unique(begins)) == len(begins)


def test_intact_drops_the_tail_that_concat_carries_over() -> None:
    lengths = [3, 7, 4, 6]
    assert unpack(intact(lengths, 8), lengths) == [[[0, 1, 2], [3, 4, 5, 6, 7]], [[10, 11, 12, 13], [14, 15, 16, 17]]]
    assert intact(lengths, 8).dropped_tokens == {"truncated": 4, "last_row": 0}
    assert unpack(concat(lengths, 8), lengths) == [
        [[0, 1, 2], [3, 4, 5, 6, 7]],
        [[8, 9], [10, 11, 12, 13], [14, 15]],
    ]
    assert concat(lengths, 8).dropped_tokens == {"last_row": 4}


def test_split_takes_the_longest_pieces_first() -> None:
    layouts = split([21, 3, 16, 9], [8, 4], 8)
    assert [piece[0] for row in unpack(layouts[8], [21, 3, 16, 9]) for piece in row] == [0, 24, 40, 8, 32]
    assert layouts[8].dropped_tokens == {"last_row": 0}
    assert layouts[4].num_rows == 0
    assert layouts[4].dropped_tokens == {"short_document": 3, "remainder": 2, "last_row": 4}
    assert layouts[4].dropped_documents == {"short_document": 1, "remainder": 0, "last_row": 1}


def test_a_document_in_a_row_in_part_is_not_dropped() -> None:
    # The second document is cut by the end of the first row: its tail is dropped, the document is not.
    layout = concat([5, 6, 2], 8)
    assert layout.dropped_tokens == {"last_row": 5}
    assert layout.dropped_documents == {"last_row": 1}
    assert layout.first_rows(0).dropped_documents == {"last_row": 1, "max_rows": 2}


@given(LENGTHS, SEQ_LENGTHS, st.integers(0, 12))
def test_rows_beyond_max_rows_are_counted(lengths: list[int], seq_length: int, count: int) -> None:
    for pack in (concat, intact, best_fit):
        layout = pack(lengths, seq_length)
        first = layout.first_rows(count)
        first.validate(np.array(lengths, np.int64))
        assert unpack(first, lengths) == unpack(layout, lengths)[:count]
        assert first.dropped_tokens.get("max_rows", 0) == int(layout.row_tokens()[count:].sum())


def test_a_layout_with_no_more_rows_than_max_rows_is_unchanged() -> None:
    layout = concat([10, 10], 8)
    assert layout.num_rows == 2
    assert layout.first_rows(2) is layout


def test_fill_and_attention_cost_are_of_the_tokens_in_rows() -> None:
    layout = best_fit([3, 4, 5], 8)
    assert layout.row_tokens().tolist() == [4, 8]
    assert layout.fill == 12 / 16
    assert layout.sum_squared_lengths() == 9 + 16 + 25


@pytest.mark.parametrize("pack", [concat, intact, best_fit])
def test_no_documents_give_no_rows(pack: Callable[..., Layout]) -> None:
    layout = pack([], 8)
    layout.validate(np.empty(0, np.int64))
    assert (layout.num_rows, layout.fill, layout.sum_squared_lengths()) == (0, 0.0, 0)
    assert set(layout.dropped_tokens.values()) == {0}


def test_no_documents_give_no_split_rows() -> None:
    layouts = split([], [4, 8], 8)
    assert [layout.num_rows for layout in layouts.values()] == [0, 0]
    assert layouts[4].dropped_tokens == {"short_document": 0, "remainder": 0, "last_row": 0}


@pytest.mark.parametrize("pack", [concat, intact, best_fit])
def test_documents_of_the_row_length_make_a_row_each(pack: Callable[..., Layout]) -> None:
    layout = pack([8, 8, 8], 8)
    assert layout.document.tolist() == [0, 1, 2]
    assert layout.length.tolist() == [8, 8, 8]
    assert layout.row_bounds.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pack", [concat, intact, best_fit])
def test_documents_of_one_token_stay_apart_and_in_order(pack: Callable[..., Layout]) -> None:
    layout = pack([1] * 10, 4)
    layout.validate(np.ones(10, np.int64))
    assert layout.document[:8].tolist() == list(range(8))
    assert set(layout.length.tolist()) == {1}


def test_one_huge_document_fills_rows_from_its_beginning() -> None:
    lengths = [20_000_003]
    expected = np.arange(305) * 65_536
    for layout in (concat(lengths, 65_536), split(lengths, [65_536], 65_536)[65_536], best_fit(lengths, 65_536)):
        np.testing.assert_array_equal(layout.start[:305], expected)
        assert set(layout.length[:305].tolist()) == {65_536}
        layout.validate(np.array(lengths))
    cut_off = intact(lengths, 65_536)
    assert (cut_off.num_rows, cut_off.dropped_tokens["truncated"]) == (1, 20_000_003 - 65_536)


def test_two_pieces_of_one_document_in_one_row_stay_two_pieces() -> None:
    layout = split([8], [4], 8)[4]
    assert layout.row_bounds.tolist() == [0, 2]
    assert layout.start.tolist() == [0, 4]
    assert layout.document.tolist() == [0, 0]
