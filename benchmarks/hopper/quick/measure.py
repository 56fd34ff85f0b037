"""What the cases of the quick check share."""

from __future__ import annotations

REPEATS = 3
"""Runs that count, after one that does not."""

GIB = 2**30


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
