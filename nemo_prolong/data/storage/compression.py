"""Decompress a shard to exactly the bytes that its index promises, and to none beyond."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from nemo_prolong.data.storage.checks import Digests
from nemo_prolong.errors import DataError

_CHUNK_BYTES = 2**20
# Frames may ask for this much memory; zstd's own command line allows the same without --long.
_MAX_WINDOW_BYTES = 2**27
_ZSTD = re.compile(r"zstd(:-?\d+)?")


def decompress_zstd(
    source: Path,
    destination: Path,
    what: str,
    hashes: Mapping[str, str],
    raw_bytes: int,
    raw_hashes: Mapping[str, str],
) -> None:
    """Write the decompressed content of ``source`` to ``destination``, with one chunk and zstd's window in memory.

    Args:
        source: Compressed local file.
        destination: File to write; incomplete when this raises.
        what: Name of the source for messages.
        hashes: Hashes of the compressed bytes.
        raw_bytes: Size of the result. A frame that would give more is refused after these, not written out.
        raw_hashes: Hashes of the result.

    Raises:
        DataError: If the source is no zstd, truncated, or has other sizes or hashes.
        OSError: If the destination cannot be written.
    """
    packed, raw = Digests(what, hashes), Digests(f"{what} (decompressed)", raw_hashes)
    written_bytes = 0
    with _opened(source, what) as packed_file, destination.open("wb") as raw_file:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        hashed = cast(BinaryIO, _Hashed(packed_file, packed))  # of a file, only read is asked for
        reader = decompressor.stream_reader(hashed, read_across_frames=True)
        while chunk := _read(reader, what, min(_CHUNK_BYTES, raw_bytes - written_bytes + 1)):
            written_bytes += len(chunk)
            if written_bytes > raw_bytes:
                raise _wrong_size(what, f"more than the {raw_bytes} bytes")
            raw.update(chunk)
            raw_file.write(chunk)
    if written_bytes < raw_bytes:
        raise _wrong_size(what, f"{written_bytes} of the {raw_bytes} bytes")
    packed.check()
    raw.check()


def is_zstd(compression: str) -> bool:
    """Return whether a shard's ``compression`` (``zstd``, ``zstd:7``) is one that is read."""
    return _ZSTD.fullmatch(compression) is not None


def _opened(source: Path, what: str) -> BinaryIO:
    # Explained here: for the caller, an OSError is one of the destination.
    try:
        return source.open("rb")
    except OSError as error:
        raise DataError(what, f"cannot be read ({error.strerror}).", "Check its permissions.") from error


class _Hashed:
    """A binary file that shows what is read from it to ``digests``."""

    def __init__(self, file: BinaryIO, digests: Digests) -> None:
        self._file = file
        self._digests = digests

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._digests.update(chunk)
        return chunk


def _read(reader: zstandard.ZstdDecompressionReader, what: str, size: int) -> bytes:
    try:
        return reader.read(size)
    except zstandard.ZstdError as error:
        raise DataError(
            what, f"cannot be decompressed ({error}).", "The file is damaged: copy or write it again."
        ) from error


def _wrong_size(what: str, how_much: str) -> DataError:
    return DataError(
        what,
        f"decompresses to {how_much} that its index says.",
        "The file is truncated or foreign: copy or write it again.",
    )
