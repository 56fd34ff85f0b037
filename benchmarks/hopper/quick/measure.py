"""What the cases of the quick check share."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.hopper.bench import Bench

GIB = 2**30


def repeats(bench: Bench) -> int:
    """Return how many runs count, after one that does not."""
    return bench.sized(3, 1)


def documents_of(lengths: Sequence[int]) -> str:
    """Return what a row of documents is called.

    >>> documents_of([8]), documents_of([4, 4]), documents_of([1, 7])
    ('one document', '2 equal documents', '2 short documents')
    """
    if len(lengths) == 1:
        return "one document"
    return f"{len(lengths):,} {'equal' if len(set(lengths)) == 1 else 'short'} documents"


def first_line(error: Exception) -> str:
    """Return the first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
