"""Sizes and hashes that an index promises, compared with the bytes that are there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from nemo_prolong.errors import DataError

log = logging.getLogger(__name__)
_CHUNK_BYTES = 2**20
# The shake functions have no digest of one length.
_ALGORITHMS = {name for name in hashlib.algorithms_available if not name.startswith("shake")}


class Digests:
    """Running hashes of bytes that pass by.

    Args:
        what: The file, for messages.
        expected: Algorithm of ``hashlib`` to hexadecimal digest. Others (the xxhash family, which
            ``mosaicml-streaming`` can write) are not computed; a warning says so.
    """

    def __init__(self, what: str, expected: Mapping[str, str]) -> None:
        self._what = what
        self._expected = {name: digest.lower() for name, digest in expected.items() if name in _ALGORITHMS}
        self._running = {name: hashlib.new(name, usedforsecurity=False) for name in self._expected}
        if unknown := sorted(expected.keys() - self._expected.keys()):
            log.warning("%s: hashes of type %s are not checked", what, ", ".join(unknown))

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        for running in self._running.values():
            running.update(chunk)

    def check(self) -> None:
        """Compare.

        Raises:
            DataError: If a digest is not the one expected.
        """
        for name, running in self._running.items():
            if running.hexdigest() != self._expected[name]:
                raise DataError(
                    self._what,
                    f"has the {name} {running.hexdigest()}, its index says {self._expected[name]}.",
                    "The file is damaged or foreign: copy or write it again.",
                )


def check_hashes(path: Path, what: str, expected: Mapping[str, str]) -> None:
    """Read a file and compare its hashes; nothing is read where there is none to compare.

    Args:
        path: Local file.
        what: Its name for messages.
        expected: As for :class:`Digests`.

    Raises:
        DataError: If a digest is not the one expected.
    """
    if not expected:
        return
    digests = Digests(what, expected)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digests.update(chunk)
    digests.check()


def check_size(path: Path, what: str, num_bytes: int) -> None:
    """Compare the size of a local file.

    Raises:
        DataError: If it is missing or has another size.
    """
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(what, f"cannot be read ({error.strerror}).", "Copy or write the file again.") from error
    if found_bytes != num_bytes:
        raise DataError(
            what,
            f"has {found_bytes} bytes, its index says {num_bytes}.",
            "The file is truncated or foreign: copy or write it again.",
        )
