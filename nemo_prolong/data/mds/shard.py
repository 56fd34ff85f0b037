"""The bytes of a shard, and of the index that names it: version 2 of MDS, as ``mosaicml-streaming`` writes it.

A directory holds ``index.json`` and shards. A shard is ``uint32 rows``, ``uint32 offset[rows + 1]``, a JSON text of the
columns, then the rows. A row is the sizes of its variable columns and then its values, columns in alphabetical order.
The size of a row follows from the sizes of its values, so where shards begin can be planned before anything is encoded,
and any process can write any shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_prolong.data.mds.encodings import Encoding, parse_encoding
from nemo_prolong.data.mds.hashing import check_writable, digest
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.files import publish, sync, synced_file, write_text_atomically

INDEX = "index.json"
SHARD_BYTES = 64 * 2**20
"""Largest shard, unless a single row is larger."""
OFFSET_BYTES = 4
"""What a row takes in a shard's header."""

_SIZE_BYTES = 4
_MAX_SHARD_BYTES = 2**32 - 1
_ZSTD_LEVELS = range(1, 23)
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a directory have in common; encodes rows and writes shards of them.

    Equal formats and rows give equal bytes. Hashable and picklable, for caches and worker processes.

    Attributes:
        columns: Column name to encoding name.
        shard_bytes: A new shard begins before one would grow beyond this, uncompressed.
        compression: None, ``zstd`` (level 3) or ``zstd:LEVEL`` with a level of 1 to 22.
        hashes: Algorithms of ``hashlib``, sorted; what the index says of every file.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If an encoding is refused.
    """

    columns: dict[str, str]
    shard_bytes: int = SHARD_BYTES
    compression: str | None = None
    hashes: tuple[str, ...] = ("sha256",)

    def __post_init__(self) -> None:
        if not 1 <= self.shard_bytes <= _MAX_SHARD_BYTES:
            raise ConfigError(
                f"shard_bytes={self.shard_bytes}", "an MDS shard holds less than 4 GiB.", f"Use {SHARD_BYTES}."
            )
        check_writable(self.hashes)
        _ = self._encodings, self._zstd_level

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.columns.items())), self.shard_bytes, self.compression, self.hashes))

    @cached_property
    def variable_columns(self) -> tuple[str, ...]:
        """Columns whose values differ in size, in the order of the row."""
        return tuple(name for name, encoding in self._encodings.items() if encoding.size_bytes is None)

    @property
    def overhead_bytes(self) -> int:
        """Size of a shard without rows, uncompressed."""
        return 8 + len(self._config_json)

    def row_bytes(self, values: Mapping[str, str | tuple[int, ...] | Any]) -> int:
        """Return what a row adds to the size of a shard, its offset in the header included.

        Args:
            values: For every variable column what its size follows from: the shape of an array, the text of a ``str``.
        """
        variable = sum(_SIZE_BYTES + self._encodings[name].measure(values[name]) for name in self.variable_columns)
        return OFFSET_BYTES + self._fixed_bytes + variable

    def encode(self, row: Mapping[str, Any]) -> bytes:
        """Return the bytes of a row; a shard grows by them and ``OFFSET_BYTES``.

        Args:
            row: A value for every column.

        Raises:
            DataError: If a column is missing or a value does not fit its encoding.
        """
        if row.keys() != self._encodings.keys():
            raise DataError(
                f"columns={sorted(row)}",
                f"a row has exactly the columns {list(self._encodings)}.",
                "Write them all and no others.",
            )
        sizes, values = [], []
        for name, encoding in self._encodings.items():
            value = _encoded(name, encoding, row[name])
            values.append(value)
            if encoding.size_bytes is None:
                sizes.append(len(value))
        _check_size(sum(map(len, values)), "row")
        return b"".join([np.array(sizes, "<u4").tobytes(), *values])

    def write_shard(self, directory: str | Path, basename: str, encoded_rows: Sequence[bytes]) -> dict[str, Any]:
        """Write a shard, which appears under its name complete and synced; memory is twice its size.

        Args:
            directory: Directory, which must exist.
            basename: Name without the ending for compression, such as ``shard.00000.mds``.
            encoded_rows: What ``encode`` gave.

        Returns:
            The shard's entry for ``write_index``, made of JSON values.

        Raises:
            DataError: If the shard has more than 4 GiB.
            OSError: If it cannot be written.
        """
        data = self._shard_data(encoded_rows)
        raw_data, zip_data = self._file_entry(basename, data), None
        if self.compression is not None:
            data = self._compressed(data)
            zip_data = self._file_entry(f"{basename}.zstd", data)
        _write_file(Path(directory) / (zip_data or raw_data)["basename"], data)
        return {**self._config, "raw_data": raw_data, "samples": len(encoded_rows), "zip_data": zip_data}

    def write_index(self, directory: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write ``index.json``, which makes the directory readable; to be called when all its shards are written.

        Args:
            directory: Directory of the shards.
            entries: What ``write_shard`` returned, in the order of the rows.

        Raises:
            OSError: If it cannot be written.
        """
        index = json.dumps({"shards": list(entries), "version": 2}, sort_keys=True)
        write_text_atomically(Path(directory) / INDEX, index)
        sync(Path(directory))

    @cached_property
    def _encodings(self) -> dict[str, Encoding]:
        return {name: parse_encoding(self.columns[name], f"column {name}") for name in sorted(self.columns)}

    @cached_property
    def _fixed_bytes(self) -> int:
        return sum(encoding.size_bytes or 0 for encoding in self._encodings.values())

    @cached_property
    def _zstd_level(self) -> int:
        if self.compression in (None, "zstd"):
            return _ZSTD_LEVEL
        algorithm, _, level = str(self.compression).partition(":")
        if algorithm != "zstd" or not level.isdecimal() or int(level) not in _ZSTD_LEVELS:
            raise ConfigError(f"compression={self.compression}", "is no compression of shards.", "Use zstd or zstd:3.")
        return int(level)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return {
            "column_encodings": [encoding.name for encoding in self._encodings.values()],
            "column_names": list(self._encodings),
            "column_sizes": [encoding.size_bytes for encoding in self._encodings.values()],
            "compression": self.compression,
            "format": "mds",
            "hashes": list(self.hashes),
            "size_limit": self.shard_bytes,
            "version": 2,
        }

    @cached_property
    def _config_json(self) -> bytes:
        return json.dumps(self._config, sort_keys=True).encode()

    def _shard_data(self, encoded_rows: Sequence[bytes]) -> bytes:
        offsets = np.cumsum([0, *map(len, encoded_rows)], dtype=np.int64)
        offsets += 4 + OFFSET_BYTES * len(offsets) + len(self._config_json)
        _check_size(int(offsets[-1]), "shard")
        head = np.array([len(encoded_rows), *offsets], "<u4").tobytes()
        return b"".join([head, self._config_json, *encoded_rows])

    def _file_entry(self, basename: str, data: bytes) -> dict[str, Any]:
        hashes = {algorithm: digest(algorithm, data, basename) for algorithm in self.hashes}
        return {"basename": basename, "bytes": len(data), "hashes": hashes}

    def _compressed(self, data: bytes) -> bytes:
        from zstandard import ZstdCompressor

        # One thread is not none: with any number of threads zstd cuts large inputs into the same jobs, and that is what
        # the reference library does on every machine. It is also quicker where a core is free.
        return ZstdCompressor(level=self._zstd_level, threads=1).compress(data)


def _encoded(name: str, encoding: Encoding, value: Any) -> bytes:
    try:
        return encoding.encode(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"column {name}", f"{error}.", f"Give a value that {encoding.name} can hold.") from error


def _check_size(num_bytes: int, kind: str) -> None:
    if num_bytes > _MAX_SHARD_BYTES:
        raise DataError(
            f"{kind} of {num_bytes} bytes", "an MDS shard holds less than 4 GiB.", "Lower seq_length, or shard_bytes."
        )


def _write_file(path: Path, data: bytes) -> None:
    # Under one name for every writer of the shard: the next one overwrites what a killed one left in the directory.
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with synced_file(temporary) as file:
            file.write(data)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
