from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.data.packing import Layout, best_fit, concat, gather, intact, split

LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 100)), max_size=30)


def bounds_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def layouts_of(lengths: list[int]) -> list[Layout]:
    return [concat(lengths, 24), intact(lengths, 24), best_fit(lengths, 24), *split(lengths, [12, 4], 24).values()]


@given(LENGTHS)
def test_a_row_is_its_pieces_and_indices_are_their_ends(lengths: list[int]) -> None:
    bounds = bounds_of(lengths)
    tokens = np.arange(1000, 1000 + bounds[-1], dtype=np.uint32)
    for layout in layouts_of(lengths):
        for row in range(layout.num_rows):
            input_ids, indices = gather(layout, row, tokens, bounds)
            assert (input_ids.dtype, indices.dtype) == (np.uint32, np.uint32)
            assert indices[0, 0] == 0 and indices[-1, 1] == len(input_ids) == layout.row_tokens()[row]
            assert indices[1:, 0].tolist() == indices[:-1, 1].tolist()
            pieces = range(layout.row_bounds[row], layout.row_bounds[row + 1])
            assert len(indices) == len(pieces)
            for piece, (begin, end) in zip(pieces, indices.tolist(), strict=True):
                first = 1000 + bounds[layout.document[piece]] + layout.start[piece]
                assert input_ids[begin:end].tolist() == list(range(first, first + layout.length[piece]))


def test_pieces_that_meet_stay_apart_in_indices() -> None:
    layout = split([8], [4], 8)[4]
    input_ids, indices = gather(layout, 0, np.arange(8, dtype=np.uint32), np.array([0, 8]))
    assert input_ids.tolist() == list(range(8))
    assert indices.tolist() == [[0, 4], [4, 8]]


def test_a_row_from_a_mapped_file_is_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(40, dtype=np.uint32).tofile(path)
    tokens = np.memmap(path, np.uint32, mode="r")
    input_ids, _ = gather(concat([40], 16), 1, tokens, np.array([0, 40]))
    assert type(input_ids) is np.ndarray and not np.shares_memory(input_ids, tokens)
    input_ids[:] = 0
    assert tokens[16:20].tolist() == [16, 17, 18, 19]


def test_target_masks_are_gathered_like_tokens() -> None:
    lengths = [5, 7, 6]
    mask = (np.arange(18) % 3 == 0).astype(np.uint8)
    gathered, _ = gather(intact(lengths, 8), 0, mask, bounds_of(lengths))
    assert gathered.dtype == np.uint8
    assert gathered.tolist() == mask[:8].tolist()
