"""Room on the local disk: asked for before a file is written, and explained when it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_prolong.errors import DataError
from nemo_prolong.units import format_bytes

_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing_to(directory: Path, needed_bytes: int | None) -> Iterator[None]:
    """Make ``directory`` and check that ``needed_bytes`` fit; a disk that fills up in the block is explained too.

    Raises:
        DataError: If there is too little room, or the directory cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if needed_bytes is not None and shutil.disk_usage(directory).free < needed_bytes:
            raise _full(directory, needed_bytes)
        yield
    except OSError as error:
        if is_full(error):
            raise _full(directory, needed_bytes) from error
        raise DataError(
            f"{directory}",
            f"cannot be written to ({error.strerror or error}).",
            "Name a directory of your own on a local disk, as cache= or XDG_CACHE_HOME.",
        ) from error


def is_full(error: Exception) -> bool:
    """Return whether an error says that a file cannot grow: disk, quota or file size limit."""
    return isinstance(error, OSError) and error.errno in _FULL_ERRNOS


def _full(directory: Path, needed_bytes: int | None) -> DataError:
    needed = f"{format_bytes(needed_bytes)} more are needed" if needed_bytes is not None else "more is needed"
    free = format_bytes(shutil.disk_usage(directory).free)
    return DataError(
        f"{directory}",
        f"has too little room: {needed}, {free} are free.",
        "Free some, or name a directory on another disk, as cache= or XDG_CACHE_HOME.",
    )
