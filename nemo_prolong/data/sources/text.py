"""Trees of text files: one file, one document."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Document, Item, Unit, Unread
from nemo_prolong.data.sources.listing import chosen_files
from nemo_prolong.data.sources.planning import units_of_groups
from nemo_prolong.data.sources.rejection import BadDocument, drop_or_refuse
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import local_copy
from nemo_prolong.errors import DataError

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
_PIECE_BYTES = 2**20
_BOM = "\ufeff"


def plan(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: whole files."""
    files = chosen_files(source, is_text, "text file (*.txt, *.md, *.markdown, *.rst)")
    return list(units_of_groups([(file,) for file in files], unit_bytes))


def is_text(name: str) -> bool:
    """Return whether a file name is one of prose."""
    return name.lower().endswith(SUFFIXES)


def read(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield the documents of a unit.

    Raises:
        DataError: For a file that is empty or no UTF-8, where the source refuses those.
    """
    for file in unit.files:
        path = local_copy(file, cache)
        try:
            pieces = _checked_pieces(file, path)
        except BadDocument as bad:
            yield drop_or_refuse(source, bad, file.name, file.path, file.num_bytes)
            continue
        except OSError as error:
            raise _unreadable(file, error) from error
        yield Document(file.name, file.name, pieces=pieces)


def text_pieces(path: Path) -> Iterator[str]:
    """Yield a file in pieces of about a million characters, whole characters each, without a byte order mark.

    Raises:
        BadDocument: If it is no UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        position = 0
        while True:
            block = file.read(_PIECE_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = position - waiting + error.start
                rule = f"is no UTF-8: byte {place} is {error.object[error.start]:#04x} ({error.reason})."
                raise BadDocument("invalid_utf8", rule, "Convert it to UTF-8.") from error
            if position == 0:
                text = text.removeprefix(_BOM)
            if text:
                yield text
            if not block:
                return
            position += len(block)


def _checked_pieces(file: SourceFile, path: Path) -> Iterator[str] | tuple[str, ...]:
    """Return the pieces of a file that has been read through once, so that a reader is never left with half of it.

    Raises:
        BadDocument: If the file is empty or no UTF-8.
    """
    first, is_long = "", False
    for number, piece in enumerate(text_pieces(path)):
        if number == 0:
            first = piece
        is_long = number > 0
    if not first:
        raise BadDocument("empty_document", "holds no text.", "Remove it.")
    return _read_again(file, path) if is_long else (first,)


def _read_again(file: SourceFile, path: Path) -> Iterator[str]:
    """Yield the pieces of a file that was right before.

    Raises:
        DataError: If it no longer is.
    """
    try:
        yield from text_pieces(path)
    except (BadDocument, OSError) as error:
        raise DataError(file.path, "has changed while it was read.", "Let nothing write to the corpus.") from error


def _unreadable(file: SourceFile, error: OSError) -> DataError:
    return DataError(file.path, f"cannot be read ({error.strerror}).", "Check that the file is still there.")
