"""Operations on integer arrays that numpy has no name for."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", bound=np.generic)
"""What an array holds."""


def count_up(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, ... as int64 [sum(counts)]."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(ends - counts, counts)


def stable_order(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order that sorts ``keys``, equal ones as they come; int64 [N].

    Keys are integers from 0 on. They are sorted by 16 bits at a time, the lowest first, because numpy sorts 16-bit
    integers in linear time: two passes over 2M keys take a fifth of the time of one comparison sort.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    shift = 16
    while int(keys.max(initial=0)) >> shift:
        order = order[np.argsort((keys >> shift).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order
