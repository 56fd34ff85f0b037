"""A lock between processes and between threads that goes with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``path`` in the block.

    The kernel keeps it with the open file, so a killed process holds nothing, and two threads that both open the file
    exclude each other. The file stays: removing it would let two holders lock two files of one name.

    Args:
        path: File of the lock, made where it is missing; on a local disk.
        wait: Wait for the lock; else go on without it.

    Yields:
        Whether the lock is held: always, where ``wait``.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _acquire(descriptor, wait)
    finally:
        # Unlocked by name and not only closed: a process forked meanwhile has the same open file.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _acquire(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
