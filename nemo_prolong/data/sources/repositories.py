"""Source repositories: all files of one repository in one document, sorted by path.

ProLong's code domain is The Stack with the files of a repository concatenated, in no order of dependencies. Sorting by
path is the same on every machine, keeps directories together, and needs no parser per language.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Document, Item, Rejected, Unit, Unread
from nemo_prolong.data.sources.code_files import (
    BUILD_DIRECTORIES,
    CODE_LINE_CHARACTERS,
    MAX_FILE_BYTES,
    PROSE_LINE_CHARACTERS,
    PROSE_SUFFIXES,
    VENDORED_DIRECTORIES,
    is_generated_name,
    is_source,
    suffix_of,
    text_fault,
)
from nemo_prolong.data.sources.listing import name_filter
from nemo_prolong.data.sources.planning import units_of_groups
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)

_BOM = "\ufeff"
_SHOWN = 5
_EXPLANATIONS = {
    "binary": "holds a zero byte, or is no UTF-8",
    "build_output": "a directory that tools fill",
    "empty": "holds no text",
    "empty_repository": "no file of the repository is left",
    "generated": "its name or first lines say that a tool wrote it",
    "hidden": "its name begins with a dot",
    "link": "a link; what it points to in the repository is taken where it lies",
    "minified": f"has a line of more than {CODE_LINE_CHARACTERS} characters (prose: {PROSE_LINE_CHARACTERS})",
    "other_kind": "not the name of a source or documentation file",
    "too_large": f"larger than {format_bytes(MAX_FILE_BYTES)}",
    "vendored": "a directory of other people's code",
}


@dataclass(frozen=True)
class Listing:
    """The files of one repository, by name, kind and size alone.

    Attributes:
        files: Those to read, sorted by name.
        left_out: Files and directories that are not read, with the reason.
    """

    files: list[SourceFile] = field(default_factory=list)
    left_out: list[Rejected] = field(default_factory=list)


def plan(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: whole repositories.

    Raises:
        ConfigError: If the path is no local directory of repositories.
        DataError: If a directory cannot be read, or no repository holds a file to read.
    """
    groups: list[list[SourceFile]] = []
    without: list[str] = []
    left_bytes = source.max_bytes
    for name in repository_names(source.path):
        files = list_repository(source, name).files
        if not files:
            without.append(name)
            continue
        if left_bytes is not None:
            left_bytes -= sum(file.num_bytes for file in files)
            if groups and left_bytes < 0:
                break
        groups.append(files)
    if without:
        shown = ", ".join(without[:_SHOWN]) + (", ..." if len(without) > _SHOWN else "")
        log.warning("%s: %d repositories hold no file to read: %s", source.path, len(without), shown)
    if not groups:
        rule = "holds no repository with source files."
        raise DataError(f"path={source.path}", rule, "Check the path, and include if it is set.")
    return list(units_of_groups(groups, unit_bytes))


def read(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield a document for every repository of a unit, after what was left out of it.

    What is left out is a choice of this format, not a bad document, so it is counted whatever ``on_bad_document`` says.
    """
    for name, group in groupby(unit.files, key=lambda file: file.name.partition("/")[0]):
        yield from list_repository(source, name).left_out
        kept = []
        for file in group:
            reason = _content_fault(file)
            if reason is None:
                kept.append(file)
            else:
                yield _left_out(file.name, reason, file.num_bytes)
        if kept:
            yield Document(name, name, pieces=_pieces(kept))
        else:
            yield _left_out(name, "empty_repository", 0)


def repository_names(path: str) -> list[str]:
    """Return the names of the repositories of a source, sorted.

    Raises:
        ConfigError: If the path is no local directory, has no directories, or is a repository itself.
    """
    if not os.path.isdir(path):
        rule = "is not a local directory, which repositories are read from."
        raise ConfigError(f"path={path}", rule, "Name the directory that holds one directory per repository.")
    if os.path.exists(os.path.join(path, ".git")):
        parent = os.path.dirname(os.path.abspath(path))
        raise ConfigError(f"path={path}", "is a repository itself.", f"Name the directory above it: path={parent}.")
    names = [name for name in sorted(os.listdir(path)) if os.path.isdir(os.path.join(path, name)) and name[0] != "."]
    if not names:
        raise ConfigError(f"path={path}", "holds no directories.", "Put every repository into a directory of its own.")
    return names


def list_repository(source: SourceConfig, repository: str) -> Listing:
    """Return the files of a repository, chosen by name, kind and size.

    Raises:
        DataError: If a directory cannot be read.
    """
    listing = Listing()
    _add_directory(listing, source, name_filter(source, is_source), repository)
    return Listing(
        sorted(listing.files, key=lambda file: file.name), sorted(listing.left_out, key=lambda left: left.key)
    )


def _add_directory(listing: Listing, source: SourceConfig, is_wanted: Callable[[str], bool], below: str) -> None:
    """Add the files below a directory; links are not followed, what they point to in the repository is taken anyway."""
    for entry in _entries(os.path.join(source.path, below)):
        name = f"{below}/{os.fsencode(entry.name).decode('utf-8', 'replace')}"
        is_directory = entry.is_dir(follow_symlinks=False)
        reason, num_bytes = _directory_fault(entry.name) if is_directory else None, 0
        if not is_directory:
            num_bytes = entry.stat(follow_symlinks=False).st_size
            reason = _file_fault(entry, num_bytes, is_wanted(name), bool(source.include))
        if reason is not None:
            listing.left_out.append(_left_out(name, reason, num_bytes))
        elif is_directory:
            _add_directory(listing, source, is_wanted, name)
        else:
            listing.files.append(SourceFile(entry.path, name, num_bytes))


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            return list(found)
    except OSError as error:
        raise DataError(directory, f"cannot be listed ({error.strerror}).", "Check path and permissions.") from error


def _directory_fault(name: str) -> str | None:
    if name.startswith("."):
        return "hidden"
    if name in VENDORED_DIRECTORIES:
        return "vendored"
    return "build_output" if name in BUILD_DIRECTORIES else None


def _file_fault(entry: os.DirEntry[str], num_bytes: int, is_wanted: bool, is_chosen_by_user: bool) -> str | None:
    """Return why a file is not read, from its name, kind and size."""
    if not entry.is_file(follow_symlinks=False):
        return "link" if entry.is_symlink() else "other_kind"
    if entry.name.startswith("."):
        return "hidden"
    if is_generated_name(entry.name) and not is_chosen_by_user:
        return "generated"
    if not is_wanted:
        return "other_kind"
    if num_bytes == 0:
        return "empty"
    return "too_large" if num_bytes > MAX_FILE_BYTES else None


def _content_fault(file: SourceFile) -> str | None:
    """Return why a file is left out, from its text."""
    text = _text(file)
    if text is None:
        return "binary"
    if not text or text.isspace():
        return "empty"
    is_prose = suffix_of(file.name) in PROSE_SUFFIXES
    return text_fault(text, PROSE_LINE_CHARACTERS if is_prose else CODE_LINE_CHARACTERS)


def _pieces(files: Sequence[SourceFile]) -> Iterator[str]:
    for file in files:
        text = _text(file)
        if text is None:
            raise DataError(file.path, "has changed while it was read.", "Let nothing write to the repositories.")
        yield f"# file: {file.name}\n{text}\n"


def _text(file: SourceFile) -> str | None:
    """Return the text of a file, None where it is no UTF-8.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return Path(file.path).read_bytes().decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise DataError(file.path, f"cannot be read ({error.strerror}).", "Check path and permissions.") from error


def _left_out(name: str, reason: str, num_bytes: int) -> Rejected:
    return Rejected(name, reason, num_bytes, _EXPLANATIONS[reason])
