"""Hashes of shards: the algorithms of ``hashlib``, and to read also those of the package ``xxhash``."""

from __future__ import annotations

import hashlib
from typing import Any

from nemo_prolong.errors import ConfigError, DataError

WRITABLE = tuple(sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_")))
"""What shards can be written with; ``shake_*`` have no length of their own."""


def check_writable(hashes: tuple[str, ...]) -> None:
    """Check the hashes that shards shall have.

    Raises:
        ConfigError: If one is unknown, or they are not in sorted order (the index lists them so).
    """
    if list(hashes) != sorted(set(hashes)) or not set(hashes) <= set(WRITABLE):
        raise ConfigError(
            f"hashes={list(hashes)}",
            "are no hash algorithms in sorted order.",
            f"Take some of {', '.join(WRITABLE)}.",
        )


def digest(algorithm: str, data: bytes | memoryview, where: str) -> str:
    """Return the hash of ``data`` as hexadecimal digits.

    Args:
        algorithm: As in an index: ``sha256``, ``xxh64``, ...
        data: What is hashed.
        where: What to name in an error.

    Raises:
        DataError: If the algorithm is unknown here.
    """
    hasher = _hasher(algorithm)
    if hasher is None:
        raise DataError(
            f"{where}: hash {algorithm}",
            "cannot be checked with hashlib or the package xxhash.",
            "Write the data again with sha256, or install the package that has the algorithm.",
        )
    hasher.update(data)
    return str(hasher.hexdigest())


def _hasher(algorithm: str) -> Any:
    if algorithm in WRITABLE:
        return hashlib.new(algorithm, usedforsecurity=False)
    try:
        import xxhash
    except ImportError:
        return None
    return getattr(xxhash, algorithm)() if algorithm in xxhash.algorithms_available else None
