"""The text files of a Python installation, grouped by repository.

A repository is a top-level package or module of the standard library or of site-packages. Everything is sorted, so that
the same installation always gives the same list. Nothing is imported or executed. Tests, vendored copies, generated and
minified files are left out, as code corpora do. This package is left out too: its README, which is in its metadata,
would change the figures that it gives.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_prolong.data.sources.code_files import (
    CODE_LINE_CHARACTERS,
    VENDORED_DIRECTORIES,
    text_fault,
)

_SKIPPED_DIRECTORIES = VENDORED_DIRECTORIES | set("__pycache__ test tests testing licenses license_files".split())
_DOCUMENT_SUFFIXES = (".md", ".rst", ".txt")
_LEGAL_OR_LIST = re.compile(
    r"licen[cs]e|copying|copyright|notice|authors|contributors|patents|requirements|constraints|sources|top_level"
    r"|entry_points|cmakelists|third.?party",
    re.IGNORECASE,
)
_MIN_TEXT_CHARACTERS = 64
_THIS_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class PackageFile:
    """One file: ``relative`` (path below the root, POSIX) and ``path``."""

    relative: str
    path: Path


@dataclass(frozen=True)
class Repository:
    """A top-level package: its Python files and its documentation files, each sorted by path."""

    name: str
    code: tuple[PackageFile, ...]
    documents: tuple[PackageFile, ...]


@dataclass(frozen=True)
class Installation:
    """Where the packages of an interpreter lie.

    Attributes:
        roots: Directories whose entries are packages and modules, in order of preference.
    """

    roots: tuple[Path, ...]

    @classmethod
    def current(cls) -> Installation:
        """Return the running interpreter's standard library and site-packages."""
        paths = sysconfig.get_paths()
        return cls(tuple(dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib"))))

    def repositories(self) -> list[Repository]:
        """Return all repositories, sorted by name."""
        code: dict[str, list[PackageFile]] = {}
        documents: dict[str, list[PackageFile]] = {}
        for root in self.roots:
            for name, file in _files_of_root(root):
                if name == _THIS_PACKAGE:
                    continue
                target = code if file.path.suffix == ".py" else documents
                target.setdefault(name, []).append(file)
        return [
            Repository(name, tuple(code.get(name, ())), tuple(documents.get(name, ())))
            for name in sorted(code.keys() | documents.keys())
        ]


def read_text(path: Path, max_line_characters: int = CODE_LINE_CHARACTERS) -> str | None:
    """Return the text of a file; None where it is no UTF-8, tiny, generated or has a longer line (minified, data)."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) < _MIN_TEXT_CHARACTERS or text_fault(text, max_line_characters):
        return None
    return text


def _files_of_root(root: Path) -> Iterator[tuple[str, PackageFile]]:
    """Yield (repository name, file) of everything below ``root``, in sorted order."""
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if entry.name in _SKIPPED_DIRECTORIES or entry.name.startswith((".", "__")):
            continue
        if entry.is_file() and entry.suffix == ".py":
            yield entry.stem, PackageFile(entry.name, entry)
        elif entry.is_dir() and entry.suffix == ".dist-info":
            if (entry / "METADATA").is_file():
                yield _package_of(entry), PackageFile(f"{entry.name}/METADATA", entry / "METADATA")
        elif entry.is_dir():
            for relative in _walk(entry):
                yield entry.name, PackageFile(f"{entry.name}/{relative}", entry / relative)


def _walk(directory: Path) -> list[str]:
    """Return the relative paths of code and documentation files below ``directory``, sorted."""
    found = []
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name not in _SKIPPED_DIRECTORIES and name[0] != "."]
        found += [Path(parent, name) for name in names if _is_wanted(name)]
    return sorted(path.relative_to(directory).as_posix() for path in found)


def _is_wanted(name: str) -> bool:
    return name.endswith(".py") or (name.endswith(_DOCUMENT_SUFFIXES) and not _LEGAL_OR_LIST.search(name))


def _package_of(dist_info: Path) -> str:
    """Return the import name of a distribution, so that its description stays with its code."""
    listed = dist_info / "top_level.txt"
    names = listed.read_text("utf-8", errors="replace").split() if listed.is_file() else []
    public = [name for name in names if not name.startswith("_")]
    return public[0] if public else dist_info.stem.rpartition("-")[0].lower().replace("-", "_")
