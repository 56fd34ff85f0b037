"""One mapped shard: its header is checked when it is opened, a row when it is read."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.mds.encodings import Encoding
from nemo_prolong.data.mds.hashing import digest
from nemo_prolong.data.mds.index import ShardEntry
from nemo_prolong.errors import DataError


class MappedShard:
    """The rows of a local uncompressed shard.

    Args:
        path: The file.
        where: What to name in errors: the shard as the user knows it, where ``path`` is a copy in a cache.
        entry: What the index says of it.
        columns: Column name to encoding.
        check_hashes: Read all of it and compare the hashes of the index.

    Raises:
        DataError: If its size, a hash or its header contradict the index.
    """

    def __init__(
        self, path: Path, where: str, entry: ShardEntry, columns: dict[str, Encoding], check_hashes: bool
    ) -> None:
        self._path, self._where, self._columns = path, where, columns
        self._variable = [name for name, encoding in columns.items() if encoding.size_bytes is None]
        self._data = self._map(entry.raw.num_bytes)
        # Before the hashes: it says which bytes are wrong, they only that some are.
        self._offsets = self._checked_offsets(entry.rows)
        self._check_columns(4 * (entry.rows + 2), int(self._offsets[0]))
        if check_hashes:
            self._check_hashes(entry.raw.hashes)

    def row(self, row: int) -> dict[str, Any]:
        """Return row ``row`` as column name to value; arrays are read-only views of the file.

        Raises:
            DataError: If its bytes are no such row.
        """
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        data = self._data[begin:end]
        position = 4 * len(self._variable)
        try:
            sizes = dict(zip(self._variable, np.frombuffer(data[:position], "<u4").tolist(), strict=True))
            values = {}
            for name, encoding in self._columns.items():
                size = sizes[name] if encoding.size_bytes is None else encoding.size_bytes
                values[name] = encoding.decode(data[position : position + size])
                position += size
        except (ValueError, IndexError, TypeError, RecursionError) as error:
            raise self._corrupt(f"row {row} cannot be decoded ({error})", begin, end) from error
        if position != len(data):
            raise self._corrupt(f"row {row} holds {len(data)} bytes, its columns {position}", begin, end)
        return values

    def _map(self, num_bytes: int) -> memoryview:
        try:
            with self._path.open("rb") as file:
                check_file_size(self._where, os.fstat(file.fileno()).st_size, num_bytes)
                # An empty file cannot be mapped; the header check says what is wrong with it.
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if num_bytes else b"")
        except OSError as error:
            how = f"cannot be read ({error.strerror or error})."
            raise DataError(self._where, how, "Copy or write the shard again.") from error

    def _check_hashes(self, hashes: dict[str, str]) -> None:
        for algorithm, expected in hashes.items():
            found = digest(algorithm, self._data, self._where)
            if found != expected.lower():
                raise self._corrupt(f"its {algorithm} is {found}, the index says {expected}", 0, len(self._data))

    def _checked_offsets(self, rows: int) -> NDArray[np.int64]:
        head = 4 * (rows + 2)
        if len(self._data) < head or int(np.frombuffer(self._data[:4], "<u4")[0]) != rows:
            raise self._corrupt(f"its header does not hold {rows} rows", 0, min(head, len(self._data)))
        offsets = np.frombuffer(self._data[4:head], "<u4").astype(np.int64)
        if offsets[0] < head or offsets[-1] != len(self._data) or np.any(np.diff(offsets) < 0):
            raise self._corrupt("its row offsets do not ascend to its end", 4, head)
        return offsets

    def _check_columns(self, begin: int, end: int) -> None:
        """Check that the shard describes its columns as the index does: the index may belong to other shards."""
        expected = list(self._columns), [encoding.name for encoding in self._columns.values()]
        try:
            config = json.loads(bytes(self._data[begin:end]))
            described = config["column_names"], config["column_encodings"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._corrupt(f"its description of the columns is damaged ({error!r})", begin, end) from error
        if described != expected:
            raise self._corrupt(f"its columns are {described}, the index says {expected}", begin, end)

    def _corrupt(self, how: str, begin: int, end: int) -> DataError:
        remedy = "Copy or write the shard again."
        if str(self._path) != self._where:
            remedy = f"Remove the copy {self._path}; if that is no help, copy or write the shard again."
        return DataError(self._where, f"{how} (bytes {begin} to {end}).", remedy)


def check_file_size(where: str, found_bytes: int, expected_bytes: int) -> None:
    """Compare the size of a file with what the index says.

    Raises:
        DataError: If they differ.
    """
    if found_bytes != expected_bytes:
        begin, end = sorted((found_bytes, expected_bytes))
        how = "are missing: the shard is truncated" if found_bytes < expected_bytes else "should not be there"
        raise DataError(
            where,
            f"has {found_bytes} bytes, the index says {expected_bytes}: bytes {begin} to {end} {how}.",
            "Copy or write the shard again.",
        )
