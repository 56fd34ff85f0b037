from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.data.order import BLOCK_ROWS, GlobalOrder, block_counts, mixture_pattern, permutation
from nemo_prolong.errors import ConfigError, DataError

STAGE1 = [0.30, 0.30, 0.10, 0.10, 0.04, 0.04, 0.03, 0.03, 0.03, 0.03]

_WEIGHTS = st.lists(st.integers(1, 100), min_size=1, max_size=12)


def proportions_of(weights: list[int]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def counts_in_prefixes(directories: np.ndarray, num_directories: int) -> np.ndarray:
    return np.cumsum(directories[:, None] == np.arange(num_directories), axis=0)


@given(_WEIGHTS)
def test_a_block_holds_every_share_to_a_thousandth(weights: list[int]) -> None:
    proportions = proportions_of(weights)
    counts = block_counts(proportions)
    assert sum(counts) == BLOCK_ROWS
    assert all(abs(count - BLOCK_ROWS * share) < 1 for count, share in zip(counts, proportions, strict=True))


def test_the_shares_of_the_recipe_are_exact() -> None:
    assert block_counts(STAGE1) == [300, 300, 100, 100, 40, 40, 30, 30, 30, 30]
    assert block_counts([0.29, 0.71]) == [290, 710]
    assert block_counts([1 / 3, 1 / 3, 1 / 3]) == [334, 333, 333]


def test_what_rounding_leaves_goes_to_the_largest_remainders() -> None:
    assert block_counts([0.1003, 0.2001, 0.6996]) == [100, 200, 700]
    assert block_counts([0.1004, 0.2002, 0.3003, 0.3991]) == [101, 200, 300, 399]
    assert block_counts([0.1002, 0.2004, 0.3003, 0.3991]) == [100, 201, 300, 399]
    assert block_counts([0.1007, 0.2004, 0.3008, 0.3981]) == [101, 200, 301, 398]


@settings(max_examples=30, deadline=None)
@given(_WEIGHTS)
def test_no_prefix_is_a_whole_row_away_from_any_share(weights: list[int]) -> None:
    counts = block_counts(proportions_of(weights))
    pattern = mixture_pattern(counts)
    exact = np.arange(1, BLOCK_ROWS + 1)[:, None] * np.array(counts) / BLOCK_ROWS
    assert np.abs(counts_in_prefixes(pattern, len(counts)) - exact).max() < 1


def test_every_thousand_rows_of_a_block_hold_the_mixture() -> None:
    order = GlobalOrder([50] * 10, STAGE1, seed=1)
    drawn = [order.locate(index)[0] for index in range(4000, 5000)]
    assert np.bincount(drawn).tolist() == [300, 300, 100, 100, 40, 40, 30, 30, 30, 30]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_every_epoch_of_every_directory_has_each_row_once(
    row_counts: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.integers(1, 20), min_size=len(row_counts), max_size=len(row_counts)))
    order = GlobalOrder(row_counts, proportions_of(weights), seed)
    walks: list[list[int]] = [[] for _ in row_counts]
    for index in range(1500):
        directory, row = order.locate(index)
        walks[directory].append(row)
    for rows, walk in zip(row_counts, walks, strict=True):
        for start in range(0, len(walk) - rows + 1, rows):
            assert sorted(walk[start : start + rows]) == list(range(rows))
        unfinished = walk[len(walk) // rows * rows :]
        assert len(set(unfinished)) == len(unfinished)


@given(st.integers(0, 10**6))
def test_a_row_does_not_depend_on_what_was_asked_before(index: int) -> None:
    fresh = GlobalOrder([100, 7], [0.7, 0.3], seed=5)
    used = GlobalOrder([100, 7], [0.7, 0.3], seed=5)
    for other in (0, index + 1, 3 * index, 12):
        used.locate(other)
    assert used.locate(index) == fresh.locate(index)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_rows_of_a_global_batch_do_not_depend_on_the_ranks(world_size: int) -> None:
    global_batch_size, steps = 16, 20
    whole = GlobalOrder([30, 11], [0.6, 0.4], seed=3)
    ranks = [GlobalOrder([30, 11], [0.6, 0.4], seed=3) for _ in range(world_size)]
    for step in range(steps):
        indices = range(step * global_batch_size, (step + 1) * global_batch_size)
        drawn = [ranks[index % world_size].locate(index) for index in indices]
        assert drawn == [whole.locate(index) for index in indices]


def test_seeds_directories_and_epochs_have_own_orders() -> None:
    walks = [permutation(50, *key).tolist() for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]]
    assert all(sorted(walk) == list(range(50)) for walk in walks)
    assert len({tuple(walk) for walk in walks}) == 4


def test_the_order_is_the_one_of_every_release() -> None:
    """A changed order would silently change every run that is resumed."""
    assert permutation(8, seed=42, directory=0, epoch=0).tolist() == [7, 2, 3, 6, 1, 5, 0, 4]
    order = GlobalOrder([100, 50, 20], [0.5, 0.3, 0.2], seed=42)
    assert [order.locate(index) for index in (0, 1, 2, 3, 999, 123456)] == [
        (0, 48),
        (1, 41),
        (0, 46),
        (2, 6),
        (0, 59),
        (0, 68),
    ]


@pytest.mark.parametrize(
    ("proportions", "sha256"),
    [
        (STAGE1, "7257d917742f0b81"),
        ([0.5, 0.3, 0.2], "80d4f32cc2a3d09b"),
        ([0.7, 0.3], "1aa9d00fafb18be2"),
        ([0.337, 0.211, 0.199, 0.151, 0.102], "20da2d5e771eee54"),
    ],
)
def test_the_pattern_is_the_one_of_every_release(proportions: list[float], sha256: str) -> None:
    """Other patterns are as even. A run that is resumed goes on with this one."""
    pattern = mixture_pattern(block_counts(proportions))
    assert hashlib.sha256(pattern.astype("<i8").tobytes()).hexdigest()[:16] == sha256


def test_positions_of_a_permutation_are_evenly_spread() -> None:
    first = [int(permutation(10, seed, 0, 0)[0]) for seed in range(2000)]
    assert np.bincount(first, minlength=10).min() > 150


def test_epochs_count_how_often_directories_are_walked() -> None:
    order = GlobalOrder([100, 10], [0.5, 0.5], seed=0)
    assert order.epochs(2500) == [12.5, 125.0]
    drawn = [order.locate(index)[0] for index in range(777)]
    assert order.draws(777) == np.bincount(drawn).tolist()


@pytest.mark.parametrize(
    ("proportions", "message"),
    [
        (
            [0.5, 0.4],
            "data.mixture: sum of proportions=0.9: proportions sum to 1. Scale them so that they do.",
        ),
        (
            [0.5, 2 / 3],
            "data.mixture: sum of proportions=1.16666667: proportions sum to 1. Scale them so that they do.",
        ),
        (
            [0.5, 0.500002],
            "data.mixture: sum of proportions=1.000002: proportions sum to 1. Scale them so that they do.",
        ),
        (
            [2999 / 3000, 1 / 3000],
            "data.mixture[1].proportion=0.000333333: is too small: the mixture is exact to 1/1000. "
            "Use at least 0.001, or leave the directory out.",
        ),
    ],
)
def test_proportions_that_cannot_be_kept_are_refused(proportions: list[float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GlobalOrder([10, 10], proportions, seed=0)
    assert str(caught.value) == message


def test_proportions_may_miss_one_by_what_rounding_leaves() -> None:
    assert block_counts([0.3333333, 0.3333333, 0.3333333]) == [334, 333, 333]


def test_a_directory_without_rows_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        GlobalOrder([10, 0], [0.5, 0.5], seed=0)
    assert str(caught.value) == (
        "data.mixture[1]: has no rows. Prepare more text for it, or leave it out of the mixture."
    )


def test_a_walk_makes_each_permutation_once_and_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def noting(num_rows: int, seed: int, directory: int, epoch: int) -> np.ndarray:
        made.append((directory, epoch))
        return permutation(num_rows, seed, directory, epoch)

    monkeypatch.setattr("nemo_prolong.data.order.permutation", noting)
    order = GlobalOrder([100, 70], [0.6, 0.4], seed=3)
    for index in range(1000):
        order.locate(index)
        assert len(order._permutations) <= 2
    # 600 rows are 6 epochs of 100, and 400 rows are 6 epochs of 70.
    assert sorted(made) == [(directory, epoch) for directory in (0, 1) for epoch in range(6)]
    assert sorted(order._permutations) == [(0, 5), (1, 5)]
