"""Files that are whole or not there: atomic writes, fsync, SHA-256, publishing by rename. Every room writes with these.

A file or directory is made under another name, put on disk, and renamed. After a crash the old content is there or
the new content is, never a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple


class FileDigest(NamedTuple):
    """SHA-256 of a file in hexadecimal, and its size."""

    sha256: str
    num_bytes: int


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``: a temporary file beside it, fsync, then rename.

    Missing parent directories are made. After a crash the old file or the new one is there, never a part.
    """
    write_bytes_atomically(path, text.encode())


def write_json_atomically(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused, they are not JSON."""
    write_text_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` as ``write_text_atomically`` writes text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with synced_file(temporary) as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` to be written anew; its content is on disk when the context ends well."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def append_line(path: str | Path, line: str) -> None:
    """Append ``line`` as UTF-8 and a newline; where that fails, on a full disk say, no part of it stays.

    Raises:
        OSError: If it cannot be written.
    """
    with open(path, "ab", buffering=0) as file:
        size_bytes = file.tell()
        rest = f"{line}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size_bytes)
            raise


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on disk.

    A rename is not there after a power cut before its directory is synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(directory: Path) -> None:
    """Wait until the files of a directory and its entries are on disk; what is in directories below it is left out."""
    for path in directory.iterdir():
        if path.is_file():
            sync(path)
    sync(directory)


def digest_file(path: Path) -> FileDigest:
    """Return SHA-256 and size of a file.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return FileDigest(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


def publish(temporary: Path, final: Path, *, replaced: Path | None = None) -> None:
    """Give a finished file or directory its name, and put the rename on disk.

    Args:
        temporary: What was made, on the same file system as ``final``; its own content is on disk already.
        final: The name. Nothing has it, or an empty directory does, unless ``replaced`` is given.
        replaced: Where a directory that has the name waits until the new one has it; then it is deleted. A kill in
            between leaves it there, for ``restore_replaced``.

    Raises:
        OSError: If something else has the name.
    """
    if replaced is not None and final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    os.replace(temporary, final)
    sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(final: Path, replaced: Path) -> None:
    """Undo a ``publish`` that was killed between its two renames: what had the name is still whole."""
    if replaced.exists() and not final.exists():
        replaced.rename(final)


def require_directory(directory: Path) -> None:
    """Refuse a missing directory before a library takes its name for that of a repository on the Hub.

    Raises:
        FileNotFoundError: Naming it, and where it was looked for.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}, seen from {Path.cwd()}")
