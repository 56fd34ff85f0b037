"""One process that writes rows in order: a directory that appears complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_prolong.data.mds.shard import OFFSET_BYTES, SHARD_BYTES, ShardFormat
from nemo_prolong.errors import DataError
from nemo_prolong.files import publish


class MdsWriter:
    """Write rows into a new MDS directory that appears complete or not at all.

    Rows go to ``.<name>.partial`` beside the directory. Leaving the ``with`` block without an exception writes the
    index and renames. It needs memory for twice a shard.

    Args:
        directory: Directory to create.
        columns: Column name to encoding name.
        shard_bytes: Start a new shard before it would grow beyond this, uncompressed.
        compression: None, ``zstd`` or ``zstd:LEVEL``.
        hashes: Algorithms of ``hashlib``, sorted; what the index says of every shard.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If the directory exists, or an encoding is refused.
    """

    def __init__(
        self,
        directory: str | Path,
        columns: dict[str, str],
        shard_bytes: int = SHARD_BYTES,
        compression: str | None = None,
        hashes: tuple[str, ...] = ("sha256",),
    ) -> None:
        self.directory = Path(directory)
        if self.directory.exists():
            raise DataError(f"{self.directory}", "exists; shards are never added to a directory.", "Remove it first.")
        self._format = ShardFormat(columns, shard_bytes, compression, hashes)
        self._partial = self.directory.with_name(f".{self.directory.name}.partial")
        self._rows: list[bytes] = []
        self._used_bytes = self._format.overhead_bytes
        self._entries: list[dict[str, Any]] = []

    def __enter__(self) -> MdsWriter:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row.

        Args:
            row: A value for every column.

        Raises:
            DataError: If a column is missing or a value does not fit its encoding.
        """
        encoded = self._format.encode(row)
        num_bytes = len(encoded) + OFFSET_BYTES
        if self._rows and self._used_bytes + num_bytes > self._format.shard_bytes:
            self._write_shard()
        self._rows.append(encoded)
        self._used_bytes += num_bytes

    def _write_shard(self) -> None:
        name = f"shard.{len(self._entries):05d}.mds"
        self._entries.append(self._format.write_shard(self._partial, name, self._rows))
        self._rows, self._used_bytes = [], self._format.overhead_bytes

    def _finish(self) -> None:
        if self._rows:
            self._write_shard()
        self._format.write_index(self._partial, self._entries)
        publish(self._partial, self.directory)
