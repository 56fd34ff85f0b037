"""MDS shards: a writer and a memory-mapped reader for version 2 of the format, uncompressed.

A directory holds ``index.json`` and shards. A shard is ``uint32 rows``, ``uint32 offset[rows + 1]``, a JSON text of the
columns, then the rows; a row is the sizes of its variable columns and then its values, columns in alphabetical order.
What is written here is byte for byte what ``mosaicml-streaming`` writes; what it and ProLong's packer write (also with
a merged index over sub-directories) is read here. Compressed shards and pickled columns are refused.
Opening costs one ``stat`` per shard, a row one look-up; at most ``_OPEN_SHARDS`` shards are mapped at a time.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nemo_prolong.data.mds.encodings import Encoding, parse_encoding
from nemo_prolong.errors import DataError

SHARD_BYTES = 64 * 2**20
"""Largest shard, unless a single row is larger."""
_MAX_SHARD_BYTES = 2**32 - 1
_OPEN_SHARDS = 32
_INDEX = "index.json"


class MdsWriter:
    """Write rows into a new MDS directory that appears complete or not at all.

    Rows go to ``.<name>.partial`` beside the directory; leaving the ``with`` block without an exception writes the
    index, syncs and renames. Memory: one shard.

    Args:
        directory: Directory to create.
        columns: Column name to encoding name.
        shard_bytes: Start a new shard before it would grow beyond this.

    Raises:
        DataError: If the directory exists, or an encoding is refused.
    """

    def __init__(self, directory: str | Path, columns: dict[str, str], shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = Path(directory)
        if self.directory.exists():
            raise DataError(f"{self.directory}", "exists; shards are never added to a directory.", "Remove it first.")
        self._encodings = {name: parse_encoding(columns[name], f"column {name}") for name in sorted(columns)}
        self._config = {
            "column_encodings": [encoding.name for encoding in self._encodings.values()],
            "column_names": list(self._encodings),
            "column_sizes": [encoding.size_bytes for encoding in self._encodings.values()],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": shard_bytes,
            "version": 2,
        }
        self._config_json = json.dumps(self._config, sort_keys=True).encode()
        self._empty_shard_bytes = 8 + len(self._config_json)
        self._partial = self.directory.with_name(f".{self.directory.name}.partial")
        self._rows: list[bytes] = []
        self._shard_bytes = self._empty_shard_bytes
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> MdsWriter:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row.

        Args:
            row: A value for every column.

        Raises:
            DataError: If a column is missing or a value does not fit its encoding.
        """
        encoded = self._encode(row)
        if self._rows and self._shard_bytes + len(encoded) + 4 > self._config["size_limit"]:
            self._write_shard()
        self._rows.append(encoded)
        self._shard_bytes += len(encoded) + 4

    def _encode(self, row: dict[str, Any]) -> bytes:
        if row.keys() != self._encodings.keys():
            raise DataError(
                f"{self.directory}: columns={sorted(row)}",
                f"a row has exactly the columns {list(self._encodings)}.",
                "Write them all and no others.",
            )
        sizes, values = [], []
        for name, encoding in self._encodings.items():
            try:
                values.append(encoding.encode(row[name]))
            except (ValueError, TypeError, OverflowError) as error:
                what = f"{self.directory}: column {name}"
                raise DataError(what, f"{error}.", f"Give a value that {encoding.name} can hold.") from error
            if encoding.size_bytes is None:
                sizes.append(len(values[-1]))
        return np.array(sizes, "<u4").tobytes() + b"".join(values)

    def _write_shard(self) -> None:
        offsets = np.cumsum([0, *map(len, self._rows)], dtype=np.int64)
        offsets += 4 + 4 * len(offsets) + len(self._config_json)
        if offsets[-1] > _MAX_SHARD_BYTES:
            raise DataError(
                f"{self.directory}: shard of {offsets[-1]} bytes",
                "an MDS shard holds less than 4 GiB.",
                "Lower seq_length, or shard_bytes.",
            )
        name = f"shard.{len(self._shards):05d}.mds"
        head = np.uint32(len(self._rows)).tobytes() + offsets.astype("<u4").tobytes() + self._config_json
        _write_synced(self._partial / name, head + b"".join(self._rows))
        raw_data = {"basename": name, "bytes": int(offsets[-1]), "hashes": {}}
        self._shards.append({**self._config, "raw_data": raw_data, "samples": len(self._rows), "zip_data": None})
        self._rows, self._shard_bytes = [], self._empty_shard_bytes

    def _finish(self) -> None:
        if self._rows:
            self._write_shard()
        index = json.dumps({"shards": self._shards, "version": 2}, sort_keys=True)
        _write_synced(self._partial / _INDEX, index.encode())
        os.rename(self._partial, self.directory)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class MdsReader:
    """Rows of an MDS directory by number; arrays are read-only views of the mapped file.

    Picklable, and safe to use in forked and spawned loader processes: maps are opened where they are used.

    Args:
        directory: Directory with ``index.json``.

    Raises:
        DataError: If the directory or a shard is missing, a shard has another size than the index says, is compressed,
            has a refused encoding, or a name that leaves the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._shards = [_Shard(self.directory, entry) for entry in _read_index(self.directory)]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> dict[str, str]:
        """Column name to encoding name, of the first shard."""
        return {name: encoding.name for name, encoding in self._shards[0].encodings.items()} if self._shards else {}

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return row ``row`` as column name to value.

        Raises:
            DataError: If the shard's bytes are not what its index says.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.directory}, which has {len(self)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shard(number).row(row - int(self._starts[number]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = _OpenShard(self._shards[number])
            if len(self._open) > _OPEN_SHARDS:
                # Not closed: views handed out may still live; the map goes with the last of them.
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _read_index(directory: Path) -> list[dict[str, Any]]:
    path = directory / _INDEX
    try:
        index = json.loads(path.read_text("utf-8"))
        shards = index["shards"]
        version = index["version"]
    except FileNotFoundError:
        raise DataError(
            f"{directory}", "has no index.json, so it is no finished MDS directory.", "Check the path, or write it."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}", f"is not an MDS index ({error!r}).", "Write the directory again.") from error
    if version != 2 or not isinstance(shards, list):
        raise DataError(f"{path}: version={version}", "only version 2 of the format is read.", "Convert the data.")
    return shards


class _Shard:
    """One entry of the index, checked against the file system."""

    def __init__(self, directory: Path, entry: dict[str, Any]) -> None:
        try:
            basename, self.bytes = entry["raw_data"]["basename"], int(entry["raw_data"]["bytes"])
            names, encodings, self.rows = entry["column_names"], entry["column_encodings"], int(entry["samples"])
            format_, version, compressed = entry["format"], entry["version"], entry["compression"] or entry["zip_data"]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{directory / _INDEX}", f"describes a shard without {error}.", "Write the directory again."
            ) from error
        self.path = directory / _checked_name(directory, basename)
        if (format_, version) != ("mds", 2) or compressed:
            raise DataError(
                f"{self.path}",
                f"is a {format_} shard of version {version}{', compressed' if compressed else ''}.",
                "Give uncompressed MDS of version 2.",
            )
        self.encodings: dict[str, Encoding] = {
            name: parse_encoding(encoding, f"{directory / _INDEX}: column {name}")
            for name, encoding in zip(names, encodings, strict=True)
        }
        self._check_size()

    def _check_size(self) -> None:
        try:
            size = self.path.stat().st_size
        except OSError:
            raise DataError(f"{self.path}", "is in index.json but missing.", "Copy or write the shard again.") from None
        if size != self.bytes:
            raise DataError(
                f"{self.path}",
                f"has {size} bytes, the index says {self.bytes}.",
                "The shard is truncated or foreign: copy or write it again.",
            )


def _checked_name(directory: Path, basename: Any) -> str:
    """Return ``basename``; sub-directories are fine (merged indexes have them), leaving the directory is not."""
    parts = basename.split("/") if isinstance(basename, str) else []
    if not parts or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise DataError(
            f"{directory / _INDEX}: basename={basename!r}",
            "a shard lies below the directory of its index.",
            "Use the index that came with the data.",
        )
    return basename


class _OpenShard:
    """A mapped shard.

    Raises:
        DataError: If the header contradicts the index.
    """

    def __init__(self, shard: _Shard) -> None:
        self._path = shard.path
        self._encodings = shard.encodings
        with shard.path.open("rb") as file:
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        head = 4 * (shard.rows + 2)
        if len(self._data) < head or int(np.frombuffer(self._data[:4], "<u4")[0]) != shard.rows:
            raise self._corrupt(f"its header does not hold {shard.rows} rows", 0, head)
        self._offsets = np.frombuffer(self._data[4:head], "<u4").astype(np.int64)
        if self._offsets[0] < head or self._offsets[-1] != len(self._data) or np.any(np.diff(self._offsets) < 0):
            raise self._corrupt("its row offsets do not ascend to its end", 4, head)

    def row(self, row: int) -> dict[str, Any]:
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        data = self._data[begin:end]
        variable = [name for name, encoding in self._encodings.items() if encoding.size_bytes is None]
        position = 4 * len(variable)
        try:
            sizes = dict(zip(variable, np.frombuffer(data[:position], "<u4").tolist(), strict=True))
            values = {}
            for name, encoding in self._encodings.items():
                size = sizes.get(name, encoding.size_bytes)
                values[name] = encoding.decode(data[position : position + size])
                position += size
        except (ValueError, IndexError, TypeError) as error:
            raise self._corrupt(f"row {row} cannot be decoded ({error})", begin, end) from error
        if position != len(data):
            raise self._corrupt(f"row {row} holds {len(data)} bytes, its columns {position}", begin, end)
        return values

    def _corrupt(self, how: str, begin: int, end: int) -> DataError:
        return DataError(f"{self._path}", f"{how} (bytes {begin} to {end}).", "Copy or write the shard again.")
