"""The global order of rows: which row of which directory is row ``i`` of the stage.

Row ``i`` is a pure function of (row counts, proportions, seed, i). It does not depend on ranks, workers, batch size or
the number of steps. So any world size sees the same global batches, and one integer is the whole resume state.

The mixture is a pattern of ``BLOCK_ROWS`` directories that repeats. In every block each directory has its share,
rounded to a thousandth by largest remainder. In every prefix it is less than one row away from its share. Each
directory is walked in permutations, a new one per epoch. So no row comes a second time before all have come once. The
cost is a permutation per directory and epoch, then one look-up per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.errors import ConfigError, DataError

BLOCK_ROWS = 1000
"""Rows after which the pattern of directories repeats: proportions are exact to a thousandth."""


def block_counts(proportions: Sequence[float]) -> list[int]:
    """Return how many of ``BLOCK_ROWS`` rows each directory gives, by largest remainder.

    Raises:
        ConfigError: If the proportions do not sum to 1, or one is too small to get a row in a block.
    """
    total = sum(proportions)
    if abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"data.mixture: sum of proportions={total:.9g}", "proportions sum to 1.", "Scale them so that they do."
        )
    shares = [BLOCK_ROWS * proportion for proportion in proportions]
    # The small addend keeps 0.29 * 1000 = 289.99999999999994 at 290.
    counts = [int(share + 1e-6) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda d: (counts[d] - shares[d], d))
    for directory in by_remainder[: BLOCK_ROWS - sum(counts)]:
        counts[directory] += 1
    for directory, count in enumerate(counts):
        if count == 0:
            raise ConfigError(
                f"data.mixture[{directory}].proportion={proportions[directory]:g}",
                f"is too small: the mixture is exact to 1/{BLOCK_ROWS}.",
                f"Use at least {1 / BLOCK_ROWS:g}, or leave the directory out.",
            )
    return counts


def mixture_pattern(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return a sequence in which directory ``d`` occurs ``counts[d]`` times, evenly spread.

    Among the directories that are due (one more row would not put them a whole row ahead of their share), the one whose
    next row is most urgent comes next. This is Tijdeman's solution of the chairman assignment problem: every prefix is
    less than one row away from the exact share of every directory.

    Args:
        counts: Rows of each directory, all positive.

    Returns:
        int64 [sum(counts)], directory numbers.
    """
    total, directories = sum(counts), len(counts)
    if directories == 1:
        return np.zeros(total, np.int64)
    # Everything in units of 1 / (total * (2 * directories - 2)), so that the comparison is exact.
    scale = 2 * directories - 2
    taken = [0] * directories
    pattern = []
    for position in range(1, total + 1):
        ahead = [scale * (count * position - total * done) for count, done in zip(counts, taken, strict=True)]
        due = [d for d in range(directories) if ahead[d] >= total]
        chosen = min(due, key=lambda d: ((total * (scale - 1) - ahead[d]) / counts[d], d))
        taken[chosen] += 1
        pattern.append(chosen)
    return np.array(pattern, np.int64)


def permutation(num_rows: int, seed: int, directory: int, epoch: int) -> NDArray[np.int64]:
    """Return a pseudo-random permutation of ``range(num_rows)``.

    Sorted by a 64-bit hash written out here, because random generators of libraries may change between versions and
    the order of a run must not.

    Returns:
        int64 [num_rows].
    """
    key = np.uint64(0)
    for word in (seed, directory, epoch):
        key = _mix(key ^ np.array([word], np.uint64))[0]
    return np.argsort(_mix(np.arange(num_rows, dtype=np.uint64) ^ key), kind="stable")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64 of ``values``, a bijection of uint64 [N]."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class GlobalOrder:
    """Where each row of a stage comes from.

    Args:
        row_counts: Rows of each directory.
        proportions: Share of each directory.
        seed: Seed of the permutations.

    Raises:
        DataError: If a directory has no rows.
        ConfigError: If the proportions do not sum to 1.
    """

    def __init__(self, row_counts: Sequence[int], proportions: Sequence[float], seed: int) -> None:
        assert len(row_counts) == len(proportions)
        if min(row_counts) < 1:
            raise DataError(
                f"data.mixture[{list(row_counts).index(min(row_counts))}]",
                "has no rows.",
                "Prepare more text for it, or leave it out of the mixture.",
            )
        self._row_counts = list(row_counts)
        self._seed = seed
        self._counts = block_counts(proportions)
        self._pattern = mixture_pattern(self._counts)
        chosen = self._pattern[:, None] == np.arange(len(row_counts))
        self._before = np.cumsum(chosen, axis=0) - chosen
        self._permutations: dict[tuple[int, int], NDArray[np.int64]] = {}

    def locate(self, index: int) -> tuple[int, int]:
        """Return (directory number, row number) of global row ``index``, which may be any non-negative int."""
        block, position = divmod(index, BLOCK_ROWS)
        directory = int(self._pattern[position])
        draw = block * self._counts[directory] + int(self._before[position, directory])
        epoch, place = divmod(draw, self._row_counts[directory])
        return directory, int(self._permutation(directory, epoch)[place])

    def draws(self, num_rows: int) -> list[int]:
        """Return how many of the first ``num_rows`` rows come from each directory."""
        block, position = divmod(num_rows, BLOCK_ROWS)
        partial = np.bincount(self._pattern[:position], minlength=len(self._counts))
        return [block * count + int(extra) for count, extra in zip(self._counts, partial, strict=True)]

    def epochs(self, num_rows: int) -> list[float]:
        """Return how often each directory is walked through in the first ``num_rows`` rows."""
        return [drawn / rows for drawn, rows in zip(self.draws(num_rows), self._row_counts, strict=True)]

    def _permutation(self, directory: int, epoch: int) -> NDArray[np.int64]:
        key = (directory, epoch)
        if key not in self._permutations:
            # One epoch per directory is enough for a walk in order; jumping back costs the time of a permutation.
            for old in [kept for kept in self._permutations if kept[0] == directory]:
                del self._permutations[old]
            self._permutations[key] = permutation(self._row_counts[directory], self._seed, directory, epoch)
        return self._permutations[key]
