"""The files below a local directory or a remote prefix, in one order on every machine."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.stores import filesystem, is_remote, with_retries
from nemo_prolong.errors import DataError

_MAGIC = frozenset("*?[")


def list_files(path: str, pattern: str | None = None) -> list[SourceFile]:
    """Return the files at and below ``path``, sorted by name (by code point, as S3 sorts keys).

    Args:
        path: A file, a directory or prefix, or a glob of them, local or remote. A glob has ``*``, ``?``, ``[...]``, and
            ``**`` for any number of directories. All files below a directory that matches are taken. Names are relative
            to the directory, or to what stands before the first part with a wildcard. The name of a single file is its
            last part.
        pattern: Take only files whose name ends with parts that match it: ``*.jsonl``, ``train/*.parquet``.

    Returns:
        Regular files, hidden ones included; none where nothing matches ``pattern``.

    Raises:
        DataError: If nothing is there, a link leads nowhere or in a circle, a file name is no UTF-8, or the store
            refuses or fails.
    """
    base, wanted = _split_glob(path)
    found = _remote_files(base) if is_remote(path) else list(_local_files(Path(base)))
    files = [file for file in found if wanted is None or _below_match(file.name.split("/"), wanted)]
    if not files:
        raise DataError(path, "does not exist, or holds no file.", "Check the path; a wildcard must match something.")
    if pattern is not None:
        files = [file for file in files if PurePosixPath(file.name).match(pattern)]
    return sorted(files, key=lambda file: file.name)


def _split_glob(path: str) -> tuple[str, list[str] | None]:
    """Return the part before the first wildcard, and the parts from it on (None: no wildcard, or a file so named)."""
    if _MAGIC.isdisjoint(path) or (not is_remote(path) and os.path.lexists(path)):
        return path, None
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if not _MAGIC.isdisjoint(part))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else "."), parts[first:]


def _below_match(parts: list[str], wanted: list[str]) -> bool:
    """Return whether the parts of a name match, or begin with a directory that matches."""
    if not wanted:
        return True
    if wanted[0] == "**":
        return any(_below_match(parts[skipped:], wanted[1:]) for skipped in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _below_match(parts[1:], wanted[1:])


def _remote_files(base: str) -> list[SourceFile]:
    store = filesystem(base)
    found: dict[str, dict[str, Any]] = with_retries(base, lambda: store.find(base, detail=True))
    root = base.split("://", 1)[1].strip("/")
    files = []
    for place, info in found.items():
        inner = place.strip("/")
        # A key that ends with a slash stands for an empty directory.
        if info["type"] == "file" and not place.endswith("/"):
            name = inner.rsplit("/", 1)[-1] if inner == root else inner.removeprefix(f"{root}/")
            files.append(SourceFile(store.unstrip_protocol(place), name, info["size"]))
    return files


def _local_files(base: Path) -> Iterator[SourceFile]:
    if not base.is_dir():
        if base.exists():
            yield _local_file(base, base.name)
        return
    for directory, directories, names in os.walk(base, onerror=_unreadable, followlinks=True):
        here = Path(directory)
        for name in directories:
            _refuse_circle(here / name)
        for name in names:
            file = here / name
            if stat.S_ISREG(_status(file).st_mode):
                yield _local_file(file, file.relative_to(base).as_posix())


def _local_file(path: Path, name: str) -> SourceFile:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(repr(str(path)), "has a name that is no UTF-8.", "Rename the file.") from None
    return SourceFile(str(path), name, _status(path).st_size)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}", "is a link that leads nowhere.", "Mend or remove it.") from None
    except OSError as error:
        _unreadable(error)


def _refuse_circle(directory: Path) -> None:
    if directory.is_symlink() and directory.parent.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{directory}", "links to a directory above it, so its files have no end.", "Remove the link.")


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}", f"cannot be read ({error.strerror}).", "Check its permissions.") from error
