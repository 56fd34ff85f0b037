"""JSON lines: one object per line, plain, gzip or zstd.

A plain file is read in byte ranges. A unit has the lines that begin in its range, so that ranges need no look at the
file. Documents of plain files are named by the byte where their line begins. Counting the lines before it would mean to
read the file up to there. An error that stops the run counts them.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Item, Unit, Unread
from nemo_prolong.data.sources.listing import chosen_files
from nemo_prolong.data.sources.records import RecordReader, check_document
from nemo_prolong.data.sources.rejection import BadDocument, dropped, is_dropped, refused
from nemo_prolong.data.sources.strict_json import DuplicateKeyError, parse_json
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import local_copy
from nemo_prolong.errors import DataError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".zst", ".gz")
_COMPRESSED = (".zst", ".gz")
_BOM = b"\xef\xbb\xbf"
_BUFFER_BYTES = 2**20
_COMPRESSED_BLOCK_BYTES = 2**10
"""Decompressed at once from a zstd file: little, because text of one byte a thousand times over becomes 30,000 times
as long. It costs a millisecond per compressed megabyte."""
_MAX_WINDOW_BYTES = 2**31
"""zstd --long=31, as published web corpora use it."""


def plan(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: byte ranges of plain files, whole compressed ones."""
    files = chosen_files(source, is_jsonl, "file of JSON lines (*.jsonl, *.json, *.ndjson, *.zst, *.gz)")
    return [unit for file in files for unit in _units(file, unit_bytes)]


def is_jsonl(name: str) -> bool:
    """Return whether a file name is one of JSON lines."""
    return name.lower().endswith(SUFFIXES)


def read(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield the documents of a unit.

    Raises:
        DataError: For a damaged compressed file; for a bad line, where the source refuses those.
    """
    (file,) = unit.files
    records = RecordReader(source, unread)
    lines = _Lines(file, local_copy(file, cache))
    for offset, number, line in lines.between(unit.start, unit.stop):
        key = f"{file.name}:{number}" if lines.compressed else f"{file.name}@{offset}"
        try:
            document = records.document(_parse(line, offset), key)
            if b"\\u" in line:
                check_document(document)
        except BadDocument as bad:
            if is_dropped(source):
                yield dropped(bad, key, len(line))
                continue
            raise refused(bad, f"{file.path}:{number or lines.count_before(offset) + 1}") from bad
        yield document


def _units(file: SourceFile, unit_bytes: int) -> Iterator[Unit]:
    if file.path.lower().endswith(_COMPRESSED):
        yield Unit((file,), num_bytes=file.num_bytes)
        return
    for start in range(0, max(file.num_bytes, 1), unit_bytes):
        stop = min(start + unit_bytes, file.num_bytes)
        yield Unit((file,), start, stop, stop - start)


def _parse(line: bytes, offset: int) -> Any:
    """Return the value of a line.

    Raises:
        BadDocument: If it is no UTF-8 or no JSON.
    """
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        rule = f"is no UTF-8: byte {offset + error.start} of the file is {line[error.start]:#04x} ({error.reason})."
        raise BadDocument("invalid_utf8", rule, "Convert the file to UTF-8.") from error
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        rule = f"is no JSON: {error.msg} at column {error.pos + 1}."
        remedy = "Write one JSON object per line, not one over several lines or one list of all."
        raise BadDocument("invalid_json", rule, remedy) from error
    except DuplicateKeyError as error:
        raise BadDocument("duplicate_key", f"holds JSON in which {error}.", "Write each key once.") from error
    except (ValueError, RecursionError) as error:
        rule = f"holds JSON that cannot be read: {error}."
        raise BadDocument("invalid_json", rule, "Write smaller numbers and less nesting.") from error


class _Lines:
    """The lines of a file that hold something, with their place.

    Args:
        file: The file, for its name.
        path: Where it can be read.
    """

    def __init__(self, file: SourceFile, path: Path) -> None:
        self.compressed = file.path.lower().endswith(_COMPRESSED)
        self._file = file
        self._path = path

    def between(self, start: int, stop: int | None) -> Iterator[tuple[int, int | None, bytes]]:
        """Yield (byte where it begins, number or None, line) of the lines that begin in [start, stop).

        Bytes and numbers are those of the decompressed text; numbers, from 1, are counted where it is compressed.

        Raises:
            DataError: If the file cannot be read, or is compressed and damaged.
        """
        number = 0
        try:
            with self._open() as lines:
                offset = _to_line_start(lines, start)
                for line in lines:
                    if stop is not None and offset >= stop:
                        return
                    number += 1
                    content = line.removeprefix(_BOM) if offset == 0 else line
                    begin = offset + len(line) - len(content)
                    offset += len(line)
                    if content and not content.isspace():
                        yield begin, number if self.compressed else None, content
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            what = f"{self._file.path}: after line {number}" if self.compressed else self._file.path
            raise DataError(what, f"cannot be read on ({error}).", "Copy or compress the file again.") from error

    def count_before(self, offset: int) -> int:
        """Return how many lines end before byte ``offset`` of a plain file."""
        count, left = 0, offset
        with self._path.open("rb") as file:
            while block := file.read(min(_BUFFER_BYTES, left)):
                count += block.count(b"\n")
                left -= len(block)
        return count

    def _open(self) -> IO[bytes] | gzip.GzipFile:
        name = self._file.path.lower()
        if name.endswith(".gz"):
            return gzip.open(self._path, "rb")
        if name.endswith(".zst"):
            return io.BufferedReader(_ZstdFile(self._path), _BUFFER_BYTES)
        return self._path.open("rb", _BUFFER_BYTES)


def _to_line_start(file: IO[bytes] | gzip.GzipFile, start: int) -> int:
    """Seek to the first line that begins at byte ``start`` or after it, and return where that is."""
    if start == 0:
        return 0
    file.seek(start - 1)
    offset = start - 1
    while part := file.readline(_BUFFER_BYTES):
        offset += len(part)
        if part.endswith(b"\n"):
            break
    return offset


class _ZstdFile(io.RawIOBase):
    """The text of a zstd file of one or more frames; unlike the library's own reader it refuses a cut-off frame."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if not self._compressed:
                self._compressed = self._file.read(_COMPRESSED_BLOCK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            self._text = memoryview(self._decompress())
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self) -> bytes:
        """Return what the next block holds; what lies behind the end of its frame waits for the next call."""
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        text = self._frame.decompress(self._compressed)
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return text
