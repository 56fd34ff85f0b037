"""Parse and print the units of the field: tokens (``64K``, ``20B``), bytes, seconds.

Token suffixes are binary, as in the ProLong paper (footnote 2): K = 2**10, M = 2**20, B = 2**30, so that
``64K`` is 65,536 tokens and ``512K`` is 524,288.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "B": 2**30, "T": 2**40}
_LARGEST_FIRST = tuple(reversed(_SUFFIXES.items()))
_SIZE = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?)(?P<suffix>[KMBT]?)", re.IGNORECASE)


def parse_size(text: int | str) -> int:
    """Return the whole number that ``text`` means.

    Args:
        text: An int, or a string such as ``"64K"``, ``"1.5M"``, ``"65_536"``.

    Raises:
        ValueError: If the text is no size, or not a whole number of tokens.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"{text!r} is not a size; write a whole number, or one with K, M, B or T such as 64K")
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a whole number, or one with K, M, B or T such as 64K")
    # Not a float: that has 53 bits, and overflows.
    value = Fraction(match["number"].replace("_", "")) * _SUFFIXES[match["suffix"].upper()]
    if value.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number ({float(value)})")
    return int(value)


def format_tokens(count: int) -> str:
    """Return ``count`` to three digits in its largest binary unit; below 10K all digits, unless it is a multiple of 1K.

    >>> [format_tokens(count) for count in (65_536, 1000, 811_100, 1_950_000, 20 * 2**30)]
    ['64K', '1000', '792K', '1.86M', '20B']
    """
    if count < 10 * _SUFFIXES["K"] and count % _SUFFIXES["K"]:
        return str(count)
    suffix, unit = next(((suffix, unit) for suffix, unit in _LARGEST_FIRST if count >= unit), ("", 1))
    amount = count / unit
    return f"{amount:.3g}{suffix}" if amount < 100 else f"{amount:.0f}{suffix}"


def exact_tokens(count: int) -> str:
    """Return ``count`` as it is typed, with the largest suffix that divides it: what ``parse_size`` reads back.

    >>> exact_tokens(2**21 + 2**10), exact_tokens(1_950_000)
    ('2049K', '1950000')
    """
    fitting = ((suffix, unit) for suffix, unit in _LARGEST_FIRST if count >= unit and count % unit == 0)
    suffix, unit = next(fitting, ("", 1))
    return f"{count // unit}{suffix}"


def format_bytes(count: int) -> str:
    """Return ``count`` bytes in binary units, e.g. ``1.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Return a duration as ``45s``, ``3m20s``, ``2h05m`` or ``4d03h``."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
