"""From data to pixels: linear and logarithmic scales with ticks at round values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps ``low..high`` to ``start..stop`` pixels, by ratio if ``log``.

    Attributes:
        ticks: (value, text) where a tick goes.
    """

    low: float
    high: float
    start: float
    stop: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        transform = math.log if self.log else float
        low, high = transform(self.low), transform(self.high)
        return self.start + (transform(value) - low) / (high - low) * (self.stop - self.start)


def round_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten that lie in ``low..high``, at most ``at_most`` + 1 of them.

    With ``at_most`` of 4 or more there is always at least one.
    """
    step = round_step(high - low, at_most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def round_step(extent: float, at_most: int) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that divides ``extent`` into at most ``at_most`` parts."""
    rough = extent / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def log_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Return 1, 2 and 5 times powers of ten in ``low..high``; only the powers where that would be too many.

    Over less than a factor of ten these would be too few, and evenly spaced ticks are taken instead.
    """
    if high < 10 * low:
        return [tick for tick in round_ticks(low, high, at_most) if tick > 0]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= at_most:
            return ticks
    return ticks


def token_ticks(high: float, at_most: int) -> list[tuple[float, str]]:
    """Return ticks from 0 for a count of tokens, round in the binary unit that fits: 0, 0.2M, 0.4M, or 0, 5B, 10B."""
    units = (("T", 2**40), ("B", 2**30), ("M", 2**20), ("K", 2**10))
    suffix, unit = next(((suffix, unit) for suffix, unit in units if high >= unit), ("", 1))
    return [(value * unit, f"{value:g}{suffix}" if value else "0") for value in round_ticks(0, high / unit, at_most)]
