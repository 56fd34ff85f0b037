"""Launches of several ranks take turns: two at a time on two cores mostly wait for each other in collectives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_LOCK = Path(tempfile.gettempdir()) / f"nemo_prolong_ranks_{os.getuid()}.lock"


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Wait until no other launch of this user runs; forks may leave the context too, and end nobody's turn."""
    owner = os.getpid()
    with _LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if os.getpid() == owner:
                fcntl.flock(file, fcntl.LOCK_UN)
