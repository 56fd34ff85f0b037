"""Local, uncompressed copies of remote and compressed shards, shared by every process of a machine."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nemo_prolong.data.storage.checks import check_hashes, check_size
from nemo_prolong.data.storage.compression import decompress_zstd, is_zstd
from nemo_prolong.data.storage.disk import writing_to
from nemo_prolong.data.storage.locks import locked
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.data.storage.transfer import fetch
from nemo_prolong.errors import DataError
from nemo_prolong.files import publish, sync

_PARTIAL = ".partial"
_LOCK = ".lock"
# A path that was handed out this recently is about to be opened, so it is not evicted yet.
_GRACE_SECONDS = 30.0


def default_cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/nemo_prolong/shards``, or where it is unset a directory of the user in ``$TMPDIR``.

    A home directory is often shared by all machines of a cluster. Locks do not work on every such file system, copies
    would go over the network twice, and a stage needs up to 80 GB.

    Raises:
        DataError: If the directory in ``$TMPDIR``, which all users may write to, belongs to another user.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(configured):
        return Path(configured) / "nemo_prolong" / "shards"
    ours = Path(tempfile.gettempdir()) / f"nemo_prolong-{os.getuid()}"
    if ours.exists() and ours.stat().st_uid != os.getuid():
        raise DataError(
            f"{ours}",
            "belongs to another user, who could put other rows there.",
            "Name a directory of your own on a local disk, as cache= or XDG_CACHE_HOME.",
        )
    return ours / "shards"


@dataclass(frozen=True)
class _Shard:
    """What is asked of the cache.

    Attributes:
        source: Local path or address.
        num_bytes: Size of the source.
        hashes: Hashes of the source.
        compression: ``zstd``, ``zstd:7`` or None.
        raw_bytes: Size of the copy.
        raw_hashes: Hashes of what is decompressed.
    """

    source: str
    num_bytes: int
    hashes: Mapping[str, str]
    compression: str | None
    raw_bytes: int
    raw_hashes: Mapping[str, str]

    @property
    def remote(self) -> bool:
        return is_remote(self.source)

    @property
    def needed_bytes(self) -> int:
        """Room that making the copy takes: of a remote compressed shard both forms at once."""
        return self.raw_bytes + (self.num_bytes if self.remote and self.compression else 0)

    def copy_name(self) -> str:
        """Return the name of the copy: a hash of all that decides its content, and what a person would look for."""
        if self.remote:
            identity = [self.source]
        else:
            # A directory may be written anew under its name.
            identity = [os.path.abspath(self.source), str(os.stat(self.source).st_mtime_ns)]
        key = json.dumps([identity, self.num_bytes, sorted(self.hashes.items()), self.compression, self.raw_bytes])
        name = PurePosixPath(self.source).name[-80:]
        if self.compression is not None:
            name = name.removesuffix(".zstd").removesuffix(".zst")
        return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}-{name}"


@dataclass(frozen=True)
class ShardCache:
    """Gives a local uncompressed file for every shard, fetching it once.

    Any number of processes and threads may use one directory. One of them fetches a shard while the others wait. A copy
    has its name only when it is whole and checked. What a killed process left half-written is removed when the next
    shard is fetched. Addresses are taken to keep their content. An object that is replaced by one of the same size and
    without hashes is not noticed.

    Attributes:
        directory: Where the copies are, on a local disk. The default is :func:`default_cache_directory`.
        limit_bytes: Evict the copies used longest ago before growing beyond this. None never evicts. A copy that was
            asked for in the last 30 seconds stays, so the directory may be larger for a while. One that is mapped may
            go, because its pages live on until the map is closed. Open a file soon after getting its path.
    """

    directory: Path = field(default_factory=default_cache_directory)
    limit_bytes: int | None = None

    def get(
        self,
        source: str,
        num_bytes: int,
        hashes: Mapping[str, str],
        compression: str | None = None,
        raw_bytes: int | None = None,
        raw_hashes: Mapping[str, str] | None = None,
    ) -> Path:
        """Return a local file with the uncompressed content of ``source``.

        A local uncompressed source is returned itself after a look at its size. Its hashes are not computed, because
        that would read all of it each time (:func:`nemo_prolong.data.storage.checks.check_hashes` does).

        Args:
            source: Local path or address.
            num_bytes: Size of the source.
            hashes: Its hashes, ``hashlib`` name to hexadecimal digest; may be empty.
            compression: None, ``zstd``, or ``zstd:`` and a level.
            raw_bytes: Size after decompression; needed with ``compression``, ignored without.
            raw_hashes: Hashes after decompression.

        Raises:
            DataError: If the source is missing, refused, unreachable, compressed otherwise, or not of the sizes and
                hashes given. Also if the disk is full or the directory cannot be written.
        """
        if compression is not None and not is_zstd(compression):
            raise DataError(
                f"{source}: compression={compression}", "only zstd is decompressed.", "Compress the shards with zstd."
            )
        assert compression is None or raw_bytes is not None, "decompression needs the size it must not exceed"
        copy_bytes = num_bytes if compression is None or raw_bytes is None else raw_bytes
        shard = _Shard(source, num_bytes, hashes, compression, copy_bytes, raw_hashes or {})
        if not shard.remote:
            check_size(Path(source), source, num_bytes)
            if compression is None:
                return Path(source)
        return self._copy_of(shard)

    def _copy_of(self, shard: _Shard) -> Path:
        path = self.directory / shard.copy_name()
        if _touch(path, shard.raw_bytes):
            return path
        with writing_to(self.directory, None), locked(self._lock(path.name)):
            # Whoever held the lock before may have made it.
            if not _touch(path, shard.raw_bytes):
                self._sweep()
                self._evict(shard.raw_bytes)
                with writing_to(self.directory, shard.needed_bytes):
                    _make(shard, path)
        return path

    def _lock(self, name: str) -> Path:
        """Return one of 256 locks; two shards that share one wait for each other without need, which is rare."""
        return self.directory / f"{name[:2]}{_LOCK}"

    def _sweep(self) -> None:
        """Remove the half-written files of processes that are gone: those whose lock nobody holds."""
        for partial in self.directory.glob(f"*{_PARTIAL}"):
            with locked(self._lock(partial.name), wait=False) as held:
                if held:
                    partial.unlink(missing_ok=True)

    def _evict(self, wanted_bytes: int) -> None:
        if self.limit_bytes is None:
            return
        copies = _copies(self.directory)
        excess_bytes = sum(size for _, size, _ in copies) + wanted_bytes - self.limit_bytes
        newest = time.time() - _GRACE_SECONDS
        for used, size, path in copies:
            if excess_bytes <= 0 or used > newest:
                break
            # Another process may have evicted it just now.
            path.unlink(missing_ok=True)
            excess_bytes -= size


def _copies(directory: Path) -> list[tuple[float, int, Path]]:
    """Return (time of last use, bytes, path) of every finished copy, the one used longest ago first."""
    found = []
    for entry in os.scandir(directory):
        if not entry.name.endswith((_PARTIAL, _LOCK)):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, Path(entry.path)))
    return sorted(found)


def _touch(path: Path, num_bytes: int) -> bool:
    """Return whether the copy is there, and note that it is used now.

    The time of change is the record: times of access are not kept on most file systems.
    """
    try:
        if path.stat().st_size != num_bytes:
            return False
        # A colleague's copy can be read though not marked.
        with suppress(PermissionError):
            os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _make(shard: _Shard, path: Path) -> None:
    fetched, raw = path.with_name(f"{path.name}.fetched{_PARTIAL}"), path.with_name(f"{path.name}.raw{_PARTIAL}")
    try:
        if shard.remote:
            fetch(shard.source, fetched, shard.num_bytes)
        if shard.compression is None:
            check_hashes(fetched, shard.source, shard.hashes)
            publish(fetched, path)
        else:
            packed = fetched if shard.remote else Path(shard.source)
            decompress_zstd(packed, raw, shard.source, shard.hashes, shard.raw_bytes, shard.raw_hashes)
            sync(raw)
            publish(raw, path)
    finally:
        fetched.unlink(missing_ok=True)
        raw.unlink(missing_ok=True)
