"""Which of the files below a path belong to a source, in an order that is the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import list_files
from nemo_prolong.errors import ConfigError, DataError


def visible_files(source: SourceConfig) -> list[SourceFile]:
    """Return every file of a source, of any format, without hidden ones and those in hidden directories.

    Raises:
        ConfigError: If the path is empty.
        DataError: If nothing is there, or it cannot be read.
    """
    if not source.path:
        raise ConfigError("path=", f"the source of domain {source.domain} has no path.", "Name a file or directory.")
    return [file for file in list_files(source.path) if not is_hidden(file.name)]


def chosen_files(source: SourceConfig, is_wanted: Callable[[str], bool], wanted: str) -> list[SourceFile]:
    """Return the files of one format, sorted by name and up to the source's ``max_bytes``.

    Args:
        source: Its path is a file, taken as it is, or a directory or a glob, of which files are chosen by name.
        is_wanted: Whether a name belongs to the format; ``include`` of the source replaces it.
        wanted: What is looked for, in words, for the message if there is none.

    Raises:
        ConfigError: If the path is empty.
        DataError: If nothing is there, no file is chosen, or it cannot be read.
    """
    matches = name_filter(source, is_wanted)
    found = [file for file in visible_files(source) if file.path == source.path or matches(file.name)]
    if not found:
        looked_for = f"file that matches include={source.include}" if source.include else wanted
        raise DataError(f"path={source.path}", f"holds no {looked_for}.", "Check the path, format and include.")
    return first_files(found, source.max_bytes)


def name_filter(source: SourceConfig, is_wanted: Callable[[str], bool]) -> Callable[[str], bool]:
    """Return which names are taken: those that match ``include``, else those that ``is_wanted``."""
    if not source.include:
        return is_wanted
    return lambda name: any(_matches(name, pattern) for pattern in source.include)


def first_files(files: list[SourceFile], max_bytes: int | None) -> list[SourceFile]:
    """Return the first files up to ``max_bytes`` of input, at least one; all without a limit."""
    if max_bytes is None:
        return files
    total_bytes = 0
    for number, file in enumerate(files):
        total_bytes += file.num_bytes
        if number > 0 and total_bytes > max_bytes:
            return files[:number]
    return files


def is_hidden(name: str) -> bool:
    """Return whether a part of a relative path begins with a dot."""
    return name.startswith(".") or "/." in name


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches: with a slash the whole name, without one its last part."""
    return fnmatchcase(name if "/" in pattern else name.rpartition("/")[2], pattern)
