"""Rows of an MDS directory by number, wherever its shards are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_prolong.data.mds.hashing import WRITABLE
from nemo_prolong.data.mds.index import ShardEntry, ShardFile, read_index
from nemo_prolong.data.mds.mapped import MappedShard, check_file_size
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import DataError

if TYPE_CHECKING:
    from nemo_prolong.data.storage.cache import ShardCache

_OPEN_SHARDS = 32


class MdsReader:
    """Rows of an MDS directory by number; arrays are read-only views of the mapped file.

    Opening costs one look at the size of every local shard. A row costs one look-up. At most ``_OPEN_SHARDS`` shards
    are mapped at a time. Remote and compressed shards are fetched into the cache when one of their rows is first read.
    The hashes that the index holds are compared when a shard is first mapped in a process. A reader is picklable, and
    safe to use in forked and spawned loader processes, because maps are opened where they are used.

    Attributes:
        directory: The directory.
        shards: What the index says of the shards, in the order of their rows.

    Args:
        directory: Local directory or ``s3://`` address with ``index.json``, or with directories below it that have one.
        cache: Directory for copies of remote and compressed shards; None takes the default of ``ShardCache``.

    Raises:
        DataError: If the index is missing or damaged (``index.read_index``), a local shard is missing or of another
            size than the index says, or is there in a compression other than zstd only.
    """

    def __init__(self, directory: str | Path, cache: str | Path | None = None) -> None:
        self.directory = str(directory).rstrip("/") if is_remote(directory) else Path(directory)
        self._cache_directory = cache
        index = read_index(self.directory)
        self._encodings, self.shards = index.columns, index.shards
        # False: the uncompressed file is used, which `mosaicml-streaming` may leave beside the compressed one.
        self._packed = [self._must_unpack(shard) for shard in self.shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> dict[str, str]:
        """Column name to encoding name; empty where there is no shard."""
        return {name: encoding.name for name, encoding in self._encodings.items()}

    def require_columns(self, *names: str) -> None:
        """Check that rows have some columns; a directory without shards passes.

        Raises:
            DataError: If one is missing.
        """
        for name in names:
            if self.shards and name not in self._encodings:
                raise DataError(
                    self._where(self.shards[0].raw),
                    f"has no column {name}, but {', '.join(self._encodings)}.",
                    f"Give a directory with the column {name}.",
                )

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return row ``row`` as column name to value.

        Raises:
            DataError: If the shard cannot be fetched, or its bytes are not what its index says.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.directory}, which has {len(self)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shard(number).row(row - int(self._starts[number]))

    def verify(self, check_row: Callable[[dict[str, Any], str], object] | None = None) -> Iterator[DataError]:
        """Read every shard: its size, its hashes, its header, every row.

        Args:
            check_row: Is given the columns of every row and what to name in an error; raises DataError for a bad row.

        Yields:
            The first thing that is wrong with a shard, for every shard with which something is.
        """
        for number, entry in enumerate(self.shards):
            try:
                shard = self._map(number, check_hashes=True)
                for row in range(entry.rows):
                    columns = shard.row(row)
                    if check_row is not None:
                        check_row(columns, f"{self.directory} row {int(self._starts[number]) + row}")
            except DataError as error:
                yield error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set()}

    def _shard(self, number: int) -> MappedShard:
        if number not in self._open:
            self._open[number] = self._map(number, check_hashes=number not in self._verified)
            self._verified.add(number)
            if len(self._open) > _OPEN_SHARDS:
                # Not closed: views handed out may still live; the map goes with the last of them.
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _map(self, number: int, check_hashes: bool) -> MappedShard:
        entry = self.shards[number]
        path = self._local_path(number)
        where = self._where(entry.packed if self._packed[number] and entry.packed else entry.raw)
        return MappedShard(path, where, entry, self._encodings, check_hashes)

    def _local_path(self, number: int) -> Path:
        entry = self.shards[number]
        if self._packed[number] and entry.packed:
            raw = entry.raw
            return self._cache().get(
                self._where(entry.packed),
                entry.packed.num_bytes,
                _known(entry.packed.hashes),
                compression="zstd",
                raw_bytes=raw.num_bytes,
                raw_hashes=_known(raw.hashes),
            )
        if is_remote(self.directory):
            return self._cache().get(self._where(entry.raw), entry.raw.num_bytes, _known(entry.raw.hashes))
        return Path(self.directory, entry.raw.name)

    def _cache(self) -> ShardCache:
        from nemo_prolong.data.storage.cache import ShardCache

        return ShardCache() if self._cache_directory is None else ShardCache(Path(self._cache_directory))

    def _must_unpack(self, shard: ShardEntry) -> bool:
        """Return whether the shard is to be had only compressed; local files are looked at."""
        if not is_remote(self.directory):
            raw_bytes = self._file_bytes(shard.raw)
            if raw_bytes is not None:
                check_file_size(self._where(shard.raw), raw_bytes, shard.raw.num_bytes)
                return False
            packed_bytes = self._file_bytes(shard.packed) if shard.packed else None
            if shard.packed is None or packed_bytes is None:
                missing = self._where(shard.packed or shard.raw)
                raise DataError(missing, "is in index.json but missing.", "Copy or write the shard again.")
            check_file_size(self._where(shard.packed), packed_bytes, shard.packed.num_bytes)
        if shard.packed is None:
            return False
        if str(shard.compression).partition(":")[0] != "zstd":
            raise DataError(
                self._where(shard.packed), f"is compressed with {shard.compression}.", "Give plain shards, or zstd."
            )
        return True

    def _file_bytes(self, file: ShardFile) -> int | None:
        try:
            return Path(self.directory, file.name).stat().st_size
        except OSError:
            return None

    def _where(self, file: ShardFile) -> str:
        return f"{self.directory}/{file.name}"


def _known(hashes: dict[str, str]) -> dict[str, str]:
    """Return the hashes that the cache can compare; the others are compared when the shard is mapped."""
    return {algorithm: digest for algorithm, digest in hashes.items() if algorithm in WRITABLE}
