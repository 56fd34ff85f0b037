"""What an MDS directory says of its shards: one ``index.json``, or those of the directories below it.

Nothing in an index is believed before it is checked: names stay below the directory, no shard is listed twice, and all
shards have the same columns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_prolong.data.mds.encodings import Encoding, parse_encoding
from nemo_prolong.data.mds.shard import INDEX
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import DataError

_FIELDS = ("column_names", "column_encodings", "column_sizes")


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard.

    Attributes:
        name: Path below the directory.
        num_bytes: Its size.
        hashes: Algorithm to hexadecimal digest; empty where the writer was not asked for any.
    """

    name: str
    num_bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class ShardEntry:
    """One shard.

    Attributes:
        rows: Number of its rows.
        raw: The uncompressed file, which need not be there where ``packed`` is.
        packed: The compressed file, or None.
        compression: How ``packed`` is compressed: ``zstd``, ``zstd:7``, ...
    """

    rows: int
    raw: ShardFile
    packed: ShardFile | None
    compression: str | None


@dataclass(frozen=True)
class Index:
    """The shards of a directory in the order of their rows.

    Attributes:
        columns: Column name to encoding, the same in all shards.
        shards: The shards.
    """

    columns: dict[str, Encoding]
    shards: tuple[ShardEntry, ...]


def read_index(directory: str | Path) -> Index:
    """Read and check the index of a directory.

    Where the directory itself has none, the topmost ones below it are put together, sorted by path: data sets come as
    trees ``<domain>/<number>/index.json``. Directories whose name begins with a dot are left out.

    Args:
        directory: Local directory or remote address.

    Raises:
        DataError: If there is no index, or it is damaged, of another version, names files outside its directory or
            twice, or describes shards of different columns.
    """
    columns: dict[str, Encoding] = {}
    shards: dict[str, ShardEntry] = {}
    first: tuple[str, Any] | None = None
    for name, text in _index_files(directory):
        where = f"{directory}/{name}"
        for description in _parse(text, where):
            shard = _shard_entry(description, where, str(PurePosixPath(name).parent))
            described = [description[field] for field in _FIELDS]
            if first is None:
                columns = _parse_columns(described, where)
                first = shard.raw.name, described
            _check_shard(shard, described, first, directory)
            if shard.raw.name in shards:
                raise DataError(f"{where}: {shard.raw.name}", "is listed twice.", "Write or merge the index again.")
            shards[shard.raw.name] = shard
    return Index(columns, tuple(shards.values()))


def require_index(directory: str | Path) -> None:
    """Check that a directory has an index, or directories below it have; what is in it is not looked at.

    Raises:
        DataError: If there is none.
    """
    next(_index_files(directory))


def _index_files(directory: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name below the directory, content) of the index of a directory, or of those below it."""
    text = read_beside(directory, INDEX)
    names = [INDEX] if text is not None else _topmost(_names_below(directory))
    if not names:
        raise DataError(
            f"{directory}",
            f"has no {INDEX}, nor has a directory below it: it is no finished MDS directory.",
            "Check the path, or write it.",
        )
    for name in names:
        content = text if text is not None else read_beside(directory, name)
        assert content is not None, name
        yield name, content


def read_beside(directory: str | Path, name: str) -> bytes | None:
    """Return the content of a small file of a directory or address, or None where there is none.

    Raises:
        DataError: If it cannot be read.
    """
    if is_remote(directory):
        from nemo_prolong.data.storage.remote import read_bytes

        try:
            return read_bytes(f"{directory}/{name}")
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
    try:
        return Path(directory, name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{directory}/{name}", f"cannot be read ({error.strerror}).", "Check its permissions."
        ) from error


def _names_below(directory: str | Path) -> Iterator[str]:
    if is_remote(directory):
        from nemo_prolong.data.storage.remote import list_files

        yield from (file.name for file in list_files(str(directory), INDEX))
        return
    for here, directories, files in os.walk(directory):
        if INDEX in files:
            directories.clear()
            yield Path(here, INDEX).relative_to(directory).as_posix()
        directories[:] = [name for name in directories if not name.startswith(".")]


def _topmost(names: Iterator[str]) -> list[str]:
    """Return the sorted names without those below a directory that has an index of its own, or that is hidden."""
    kept: list[PurePosixPath] = []
    for path in sorted(map(PurePosixPath, names), key=lambda path: path.parent.parts):
        hidden = any(part.startswith(".") for part in path.parts)
        if not hidden and not any(path.is_relative_to(upper.parent) for upper in kept[-1:]):
            kept.append(path)
    return [str(path) for path in kept]


def _parse(text: bytes, where: str) -> list[Any]:
    try:
        index = json.loads(text)
        shards, version = index["shards"], index["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(where, f"is not an MDS index ({error!r}).", "Copy or write the directory again.") from error
    if version != 2 or not isinstance(shards, list):
        raise DataError(f"{where}: version={version}", "only version 2 of the format is read.", "Convert the data.")
    return shards


def _shard_entry(description: Any, where: str, parent: str) -> ShardEntry:
    try:
        kind, version, compression = description["format"], description["version"], description["compression"]
        rows = _count(description["samples"], "samples")
        raw = _shard_file(description["raw_data"], where, parent)
        packed = _shard_file(description["zip_data"], where, parent) if description["zip_data"] else None
        for field in _FIELDS:
            if not isinstance(description[field], list):
                raise TypeError(f"{field} is no list")
    except KeyError as error:
        raise DataError(where, f"describes a shard without {error}.", "Copy or write the directory again.") from error
    except TypeError as error:
        raise DataError(where, f"describes no shard ({error}).", "Copy or write the directory again.") from error
    if (kind, version) != ("mds", 2):
        raise DataError(
            f"{where}: {raw.name}", f"is a {kind} shard of version {version}.", "Give MDS shards of version 2."
        )
    return ShardEntry(rows, raw, packed, compression)


def _shard_file(description: Any, where: str, parent: str) -> ShardFile:
    name = str(PurePosixPath(parent, _checked_name(description["basename"], where)))
    hashes = description["hashes"]
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise TypeError("hashes are no texts by algorithm")
    return ShardFile(name, _count(description["bytes"], "bytes"), hashes)


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise TypeError(f"{name} is {value!r}")
    return value


def _checked_name(basename: Any, where: str) -> str:
    """Return ``basename``; sub-directories are fine (merged indexes have them), leaving the directory is not."""
    parts = basename.split("/") if isinstance(basename, str) else []
    if not parts or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise DataError(
            f"{where}: basename={basename!r}",
            "a shard lies below the directory of its index.",
            "Use the index that came with the data.",
        )
    return str(basename)


def _parse_columns(described: list[list[Any]], where: str) -> dict[str, Encoding]:
    names, encodings, sizes = described
    if not len(names) == len(encodings) == len(sizes) == len({str(name) for name in names}):
        raise DataError(
            where, f"describes columns {names} with encodings {encodings}.", "Copy or write the directory again."
        )
    columns = {}
    for name, encoding, size_bytes in zip(names, encodings, sizes, strict=True):
        columns[str(name)] = parse_encoding(str(encoding), f"{where}: column {name}")
        if columns[str(name)].size_bytes != size_bytes:
            raise DataError(
                f"{where}: column {name}={encoding}",
                f"has values of {columns[str(name)].size_bytes} bytes, not {size_bytes}.",
                "Copy or write the directory again.",
            )
    return columns


def _check_shard(shard: ShardEntry, described: list[Any], first: tuple[str, Any], directory: str | Path) -> None:
    if described != first[1]:
        raise DataError(
            f"{directory}: {shard.raw.name}",
            f"has the columns {_column_text(described)}, but {first[0]} has {_column_text(first[1])}.",
            "Keep shards of different columns in directories of their own.",
        )


def _column_text(described: list[Any]) -> str:
    return ", ".join(f"{name}={encoding}" for name, encoding in zip(described[0], described[1], strict=False))
