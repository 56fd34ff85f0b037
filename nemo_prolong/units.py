"""Parse and print the units of the field: tokens (``64K``, ``20B``), bytes, seconds.

Token suffixes are binary, as in the ProLong paper (footnote 2): K = 2**10, M = 2**20, B = 2**30, so that
``64K`` is 65,536 tokens and ``512K`` is 524,288.
"""

from __future__ import annotations

import re

_SUFFIXES = {"": 1, "K": 2**10, "M": 2**20, "B": 2**30, "T": 2**40}
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
    value = float(match["number"].replace("_", "")) * _SUFFIXES[match["suffix"].upper()]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number ({value})")
    return int(value)


def format_tokens(count: int) -> str:
    """Return ``count`` with the largest binary suffix that divides it exactly, else rounded to three digits.

    >>> format_tokens(65536), format_tokens(524288), format_tokens(1000)
    ('64K', '512K', '1000')
    """
    for suffix in ("T", "B", "M", "K"):
        unit = _SUFFIXES[suffix]
        if count >= unit and count % unit == 0:
            return f"{count // unit}{suffix}"
    for suffix in ("T", "B", "M", "K"):
        unit = _SUFFIXES[suffix]
        if count >= 10 * unit:
            value = count / unit
            return f"{value:.3g}{suffix}" if value < 100 else f"{value:.0f}{suffix}"
    return str(count)


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
