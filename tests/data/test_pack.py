from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.pack import PackedRows, Stream, concatenate, cut, pack_concat, pack_intact

LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 200)), max_size=40)
SEQ_LENGTHS = st.integers(1, 64)


def stream_of(lengths: list[int]) -> Stream:
    """Documents whose tokens are all different, so that any loss, copy or swap shows; mask = parity of the token."""
    bounds = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)
    tokens = np.arange(bounds[-1], dtype=np.uint32)
    documents = [tokens[start:end] for start, end in pairwise(bounds)]
    return concatenate(documents, [(document % 2).astype(np.uint8) for document in documents])


def check_spans(stream: Stream, rows: PackedRows) -> None:
    """Spans tile their row, and split it exactly where one document ends and another begins."""
    document_of = np.repeat(np.arange(len(stream.lengths)), stream.lengths)
    for row, spans in zip(rows.input_ids, rows.indices, strict=True):
        edges = [int(spans[0, 0]), *spans[:, 1].tolist()]
        assert edges[0] == 0 and edges[-1] == len(row)
        assert spans[1:, 0].tolist() == spans[:-1, 1].tolist()
        changes = np.flatnonzero(np.diff(document_of[row]) != 0) + 1
        assert edges[1:-1] == changes.tolist()


@given(LENGTHS, SEQ_LENGTHS)
def test_concat_keeps_every_token_in_order_except_the_last_incomplete_row(lengths: list[int], seq_length: int) -> None:
    stream = stream_of(lengths)
    rows = pack_concat(stream, seq_length)
    np.testing.assert_array_equal(rows.input_ids.reshape(-1), np.arange(rows.input_ids.size))
    assert rows.dropped_tokens == {"last_row": len(stream.tokens) - rows.input_ids.size}
    assert 0 <= rows.dropped_tokens["last_row"] < seq_length
    np.testing.assert_array_equal(rows.mask, rows.input_ids % 2)
    check_spans(stream, rows)


@given(LENGTHS, SEQ_LENGTHS)
def test_intact_begins_every_row_with_a_document_and_drops_only_cut_tails(lengths: list[int], seq_length: int) -> None:
    stream = stream_of(lengths)
    rows = pack_intact(stream, seq_length)
    assert rows.input_ids.shape == (len(rows.indices), seq_length)
    assert set(rows.input_ids[:, 0].tolist()) <= set(stream.bounds.tolist())
    kept = set(rows.input_ids.reshape(-1).tolist())
    assert len(kept) == rows.input_ids.size
    assert rows.input_ids.size + sum(rows.dropped_tokens.values()) == len(stream.tokens)
    np.testing.assert_array_equal(rows.mask, rows.input_ids % 2)
    check_spans(stream, rows)
    for document, length in enumerate(lengths):
        # A document is there from its first token on, or not at all (last row).
        begin = int(stream.bounds[document])
        present = [begin + offset in kept for offset in range(length)]
        assert present == sorted(present, reverse=True)


def test_intact_drops_the_tail_that_concat_carries_over() -> None:
    stream = stream_of([3, 7, 4, 6])
    assert pack_intact(stream, 8).input_ids.tolist() == [[*range(0, 8)], [*range(10, 18)]]
    assert pack_intact(stream, 8).dropped_tokens == {"truncated": 4, "last_row": 0}
    assert pack_concat(stream, 8).input_ids.tolist() == [[*range(0, 8)], [*range(8, 16)]]
    assert [spans.tolist() for spans in pack_concat(stream, 8).indices] == [
        [[0, 3], [3, 8]],
        [[0, 2], [2, 6], [6, 8]],
    ]


@given(LENGTHS, st.lists(st.sampled_from([3, 4, 8, 16, 64]), min_size=1, max_size=3, unique=True))
def test_cut_uses_no_token_twice_and_accounts_for_the_rest(lengths: list[int], piece_lengths: list[int]) -> None:
    stream = stream_of(lengths)
    pieces, dropped = cut(stream, piece_lengths)
    used = np.concatenate([piece.tokens for piece in pieces.values()])
    assert len(np.unique(used)) == len(used)
    assert len(used) + sum(dropped.values()) == len(stream.tokens)
    assert dropped["short_document"] == sum(length for length in lengths if length < min(piece_lengths))
    for length, piece in pieces.items():
        assert set(piece.lengths.tolist()) <= {length}
        np.testing.assert_array_equal(piece.mask, piece.tokens % 2)
        for begin in piece.bounds[:-1]:
            tokens = piece.tokens[begin : begin + length]
            np.testing.assert_array_equal(tokens, np.arange(tokens[0], tokens[0] + length))
            document = np.searchsorted(stream.bounds, tokens[0], side="right")
            assert tokens[-1] < stream.bounds[document]


def test_cut_takes_the_longest_pieces_first_and_begins_with_the_first_of_every_document() -> None:
    pieces, dropped = cut(stream_of([21, 3, 16, 9]), [8, 4])
    assert pieces[8].tokens.reshape(-1, 8)[:, 0].tolist() == [0, 24, 40, 8, 32]
    assert pieces[4].tokens.reshape(-1, 4)[:, 0].tolist() == [16]
    assert dropped == {"short_document": 3, "remainder": 2}


def test_pieces_of_the_row_length_make_rows_of_one_document() -> None:
    pieces, _ = cut(stream_of([21, 16]), [8])
    assert [spans.tolist() for spans in pack_concat(pieces[8], 8).indices] == [[[0, 8]]] * 4


def test_documents_shorter_than_a_row_in_total_give_no_row() -> None:
    for pack in (pack_concat, pack_intact):
        rows = pack(stream_of([2, 3]), 8)
        assert rows.input_ids.shape == (0, 8)
        assert sum(rows.dropped_tokens.values()) == 5


@pytest.mark.parametrize("pack", [pack_concat, pack_intact])
def test_one_huge_document_costs_no_more_than_many_small_ones(pack) -> None:
    def seconds(stream: Stream) -> float:
        start = time.perf_counter()
        pack(stream, 4096)
        return time.perf_counter() - start

    tokens = 4_000_000
    small = Stream(np.zeros(tokens, np.uint32), np.arange(0, tokens + 1, 500, dtype=np.int64))
    huge = Stream(np.zeros(tokens, np.uint32), np.array([0, tokens], np.int64))
    assert min(seconds(huge) for _ in range(3)) < 3 * min(seconds(small) for _ in range(3))
