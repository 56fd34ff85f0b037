"""Packing documents of which only some tokens have a loss, against counting token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_prolong.data.packing import NO_TARGET, DocumentTargets, Layout, best_fit, concat, intact, split

SEQ_LENGTH = 12
Masks = list[list[int]]
MASKS = st.lists(
    st.one_of(
        st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=30),
        # A prompt and an answer, and a prompt alone.
        st.builds(lambda prompt, answer: [0] * prompt + [1] * answer, st.integers(1, 20), st.integers(0, 4)),
    ),
    max_size=20,
)


def targets_of(masks: Masks, chunk_tokens: int = 5) -> tuple[np.ndarray, DocumentTargets]:
    """Return lengths and targets of documents that lie in two units, even ones in one and odd ones in the other."""
    lengths = np.array([len(mask) for mask in masks], np.int64)
    unit = np.arange(len(masks)) % 2
    offset = np.zeros(len(masks), np.int64)
    stored: list[np.ndarray] = []
    for number in (0, 1):
        mine = lengths[unit == number]
        offset[unit == number] = np.cumsum(mine) - mine
        stored.append(np.array([value for mask in masks[number::2] for value in mask], np.uint8))
    return lengths, DocumentTargets(stored.__getitem__, unit, offset, lengths, chunk_tokens)


def layouts_of(masks: Masks) -> list[Layout]:
    """Return the layout of every packing."""
    lengths, targets = targets_of(masks)
    packed = [pack(lengths, SEQ_LENGTH, targets) for pack in (concat, intact, best_fit)]
    return [*packed, *split(lengths, [6, 4], SEQ_LENGTH, targets).values()]


def trained(masks: Masks, layout: Layout) -> list[int]:
    """Return the tokens with a loss of every piece."""
    pieces = zip(layout.document.tolist(), layout.start.tolist(), layout.length.tolist(), strict=True)
    return [sum(masks[document][start + 1 : start + length]) for document, start, length in pieces]


def literal_intact(masks: Masks) -> list[list[tuple[int, int]]]:
    """Put documents into rows one at a time; return (document, tokens) of every row."""
    rows: list[list[tuple[int, int]]] = []
    row: list[tuple[int, int]] = []
    for document, mask in enumerate(masks):
        if not any(mask[1:SEQ_LENGTH]):
            continue
        room = SEQ_LENGTH - sum(tokens for _, tokens in row)
        if not any(mask[1:room]):
            rows.append(row)
            row, room = [], SEQ_LENGTH
        row.append((document, min(len(mask), room)))
        if len(mask) >= room:
            rows.append(row)
            row = []
    return rows


@given(MASKS, st.integers(1, 40))
def test_targets_are_counted_as_one_by_one(masks: Masks, chunk_tokens: int) -> None:
    _, targets = targets_of(masks, chunk_tokens)
    assert targets.totals().tolist() == [sum(mask[1:]) for mask in masks]
    first = [next((i for i, value in enumerate(mask) if i and value), len(mask)) for mask in masks]
    assert targets.first().tolist() == first


@given(MASKS, st.data())
def test_targets_of_some_documents_are_theirs(masks: Masks, data: st.DataObject) -> None:
    _, targets = targets_of(masks)
    documents = data.draw(st.lists(st.integers(0, len(masks) - 1)) if masks else st.just([]))
    some = targets.of(np.array(documents, np.int64))
    assert some.lengths.tolist() == [len(masks[document]) for document in documents]
    assert some.totals().tolist() == [sum(masks[document][1:]) for document in documents]
    assert some.first().tolist() == targets.first()[documents].tolist()
    assert some.chunk_tokens == targets.chunk_tokens


def test_targets_are_shown_without_their_arrays() -> None:
    _, targets = targets_of([[0, 1]])
    assert repr(targets) == "DocumentTargets(chunk_tokens=5)"


@given(MASKS)
def test_no_piece_without_a_target_is_in_a_row(masks: Masks) -> None:
    for layout in layouts_of(masks):
        layout.validate()
        assert all(trained(masks, layout))
        assert layout.dropped_tokens.keys() == layout.dropped_documents.keys()
        assert NO_TARGET in layout.dropped_tokens


@given(MASKS)
@example([[0, 0, 0, 1], [0] * 12 + [1]])
def test_every_token_and_document_is_in_a_row_or_counted(masks: Masks) -> None:
    lengths, targets = targets_of(masks)
    for pack in (concat, intact, best_fit):
        pack(lengths, SEQ_LENGTH, targets).validate(lengths)
    layouts = split(lengths, [6, 4], SEQ_LENGTH, targets).values()
    dropped = sum(sum(layout.dropped_tokens.values()) for layout in layouts)
    assert sum(layout.num_tokens for layout in layouts) + dropped == lengths.sum()


@given(MASKS)
@example([[0, 0, 1], [0] * 10 + [1, 1], [0, 1] * 6])
def test_intact_moves_a_document_whose_targets_a_row_would_cut_off(masks: Masks) -> None:
    lengths, targets = targets_of(masks)
    layout = intact(lengths, SEQ_LENGTH, targets)
    pieces = list(zip(layout.document.tolist(), layout.length.tolist(), strict=True))
    rows = [pieces[a:b] for a, b in zip(layout.row_bounds[:-1], layout.row_bounds[1:], strict=True)]
    assert rows == literal_intact(masks)
    assert np.all(layout.start == 0)
    beyond = [mask for mask in masks if not any(mask[1:SEQ_LENGTH])]
    assert layout.dropped_documents[NO_TARGET] == len(beyond)
    assert layout.dropped_tokens[NO_TARGET] == sum(map(len, beyond))


@given(st.lists(st.integers(1, 20), max_size=20))
def test_where_every_token_is_a_target_rows_are_those_of_text(half_lengths: list[int]) -> None:
    # Even lengths, so that no piece has a single token, which has no loss.
    lengths, targets = targets_of([[1, 1] * half for half in half_lengths])
    for pack in (concat, intact, best_fit):
        with_masks, text = pack(lengths, SEQ_LENGTH, targets), pack(lengths, SEQ_LENGTH)
        for name in ("row_bounds", "document", "start", "length"):
            np.testing.assert_array_equal(getattr(with_masks, name), getattr(text, name))
        assert with_masks.dropped_tokens == {**text.dropped_tokens, NO_TARGET: 0}


@pytest.mark.parametrize("pack", [concat, intact, best_fit])
def test_a_document_of_one_token_has_no_target(pack: Callable[..., Layout]) -> None:
    lengths, targets = targets_of([[1], [1] * SEQ_LENGTH, [1]])
    layout = pack(lengths, SEQ_LENGTH, targets)
    assert layout.document.tolist() == [1]
    assert layout.dropped_documents[NO_TARGET] == layout.dropped_tokens[NO_TARGET] == 2


def test_prompts_longer_than_a_row_leave_no_row() -> None:
    masks = [[0] * 20 + [1] * 4] * 3
    lengths, targets = targets_of(masks)
    layout = intact(lengths, SEQ_LENGTH, targets)
    assert layout.num_rows == 0
    assert layout.dropped_documents == {"truncated": 0, "last_row": 0, NO_TARGET: 3}
    assert layout.dropped_tokens == {"truncated": 0, "last_row": 0, NO_TARGET: 72}
    assert NO_TARGET == "no_target", "manifests and cards name it so"
    # The rest of a document, which has the answer, is a row's beginning there.
    assert best_fit(lengths, SEQ_LENGTH, targets).dropped_documents == {NO_TARGET: 0, "underfilled_row": 0}


def test_a_target_that_a_piece_begins_with_has_no_loss() -> None:
    masks = [[0] * 12 + [1] + [0] * 11, [0] + [1] * 11]
    lengths, targets = targets_of(masks)
    layout = concat(lengths, SEQ_LENGTH, targets)
    assert layout.document.tolist() == [1]
    assert layout.dropped_tokens == {"last_row": 0, NO_TARGET: 24}
    assert layout.dropped_documents == {"last_row": 0, NO_TARGET: 1}


def test_split_fills_rows_with_pieces_that_have_a_target() -> None:
    masks = [[0] * 6 + [0, 1, 0, 0, 0, 0], [0] * 6 + [0, 0, 0, 0, 0, 1], [0] * 6]
    lengths, targets = targets_of(masks)
    layout = split(lengths, [6], SEQ_LENGTH, targets)[6]
    assert list(zip(layout.document.tolist(), layout.start.tolist(), strict=True)) == [(0, 6), (1, 6)]
    assert layout.dropped_tokens == {"short_document": 0, "remainder": 0, NO_TARGET: 18, "last_row": 0}
    assert layout.dropped_documents == {"short_document": 0, "remainder": 0, NO_TARGET: 1, "last_row": 0}


@pytest.mark.parametrize("pack", [concat, intact, best_fit])
def test_masks_of_no_documents_give_no_rows(pack: Callable[..., Layout]) -> None:
    lengths, targets = targets_of([])
    layout = pack(lengths, SEQ_LENGTH, targets)
    layout.validate(lengths)
    assert layout.num_rows == 0
