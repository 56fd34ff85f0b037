"""Ranges of positions in a document that the loss is reported by."""

from __future__ import annotations

import functools

import torch

_SHORTEST_BUCKET_TOKENS = 2048
_MOST_SHORT_BUCKETS = 3
"""Halvings of a short row, so that a miniature has several buckets too."""


@functools.cache
def position_starts(seq_length: int) -> tuple[int, ...]:
    """Return the first position of each bucket.

    The second bucket starts at 2,048, or at an eighth of a row shorter than 16K, and every other one at twice the
    position of the one before it.

    Args:
        seq_length: Tokens of a row. No document is longer.

    >>> position_starts(65536)
    (0, 2048, 4096, 8192, 16384, 32768)
    >>> position_starts(512)
    (0, 64, 128, 256)
    """
    start = min(_SHORTEST_BUCKET_TOKENS, max(1, seq_length >> _MOST_SHORT_BUCKETS))
    starts = [0]
    while start < seq_length:
        starts.append(start)
        start *= 2
    return tuple(starts)


def bucket_names(seq_length: int) -> list[str]:
    """Return what the buckets are called in records and metrics, by first and last position.

    >>> bucket_names(512)
    ['0-63', '64-127', '128-255', '256-511']
    """
    starts = position_starts(seq_length)
    ends = [*starts[1:], max(seq_length, starts[-1] + 1)]
    return [f"{start}-{end - 1}" for start, end in zip(starts, ends, strict=True)]


@functools.cache
def starts_on(device: torch.device, seq_length: int) -> torch.Tensor:
    """Return ``position_starts`` as int64 [G] on a device. It is copied once, because the copy makes the host wait."""
    return torch.tensor(position_starts(seq_length), device=device)
