"""The format of a path, for ``format=auto``: named by what is there, never by a guess between two."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nemo_prolong.config.schema.prepare import SourceConfig, SourceFormat
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.sources.code_files import SOURCE_SUFFIXES, suffix_of
from nemo_prolong.data.sources.huggingface import hub_splits, is_saved
from nemo_prolong.data.sources.jsonl import is_jsonl
from nemo_prolong.data.sources.listing import name_filter, visible_files
from nemo_prolong.data.sources.tables import is_parquet
from nemo_prolong.data.sources.text import is_text
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.errors import ConfigError

_SHARD = ".mds"
_ABOUT_DATA = frozenset({"readme", "license", "licence", "dataset_card", "citation", "dataset_info", "dataset_infos"})
"""Files that data sets carry beside their data."""
_SHOWN_KINDS = 8


def detect_format(source: SourceConfig, cache: Path | None = None) -> SourceFormat:
    """Return the format of a source by looking at its path.

    A directory of MDS or of ``save_to_disk`` is known by its files. Repositories are known by ``.git`` in a directory
    below. Everything else is known by the endings of the files, which must be of one format. Tokenized rows and packed
    rows without spans look alike and are taken for tokenized. The format of the latter must be named.

    Raises:
        ConfigError: If the path is empty, or the files are of no format or of several. The message lists them.
        DataError: If nothing is there.
    """
    if os.path.isdir(source.path) and is_saved(source.path):
        return SourceFormat.HUGGINGFACE
    if _holds_repositories(source.path):
        return SourceFormat.REPOSITORIES
    files = visible_files(source)
    if any(_SHARD in PurePosixPath(file.name).suffixes for file in files):
        return (
            SourceFormat.PACKED_MDS
            if "indices" in MdsReader(source.path, cache).columns
            else SourceFormat.TOKENIZED_MDS
        )
    wanted = name_filter(source, lambda name: True)
    return _by_names(source, [file for file in files if wanted(file.name)])


def _holds_repositories(path: str) -> bool:
    if not os.path.isdir(path):
        return False
    with os.scandir(path) as entries:
        return any(os.path.exists(os.path.join(entry.path, ".git")) for entry in entries if entry.is_dir())


def _by_names(source: SourceConfig, files: list[SourceFile]) -> SourceFormat:
    data = [file.name for file in files if not _is_about_data(file.name)]
    tests: dict[SourceFormat, Callable[[str], bool]] = {
        SourceFormat.JSONL: is_jsonl,
        SourceFormat.PARQUET: is_parquet,
        SourceFormat.TEXT: is_text,
        SourceFormat.REPOSITORIES: _is_code,
    }
    found = [format_ for format_, is_one in tests.items() if any(map(is_one, data))]
    if not found and any(is_text(file.name) for file in files):
        return SourceFormat.TEXT
    if found == [SourceFormat.PARQUET] and hub_splits(data):
        return SourceFormat.HUGGINGFACE
    if len(found) == 1 and found[0] is not SourceFormat.REPOSITORIES:
        return found[0]
    raise _undecided(source, [file.name for file in files], found)


def _is_code(name: str) -> bool:
    return suffix_of(name) in SOURCE_SUFFIXES


def _is_about_data(name: str) -> bool:
    return PurePosixPath(name).stem.lower() in _ABOUT_DATA


def _undecided(source: SourceConfig, names: list[str], found: list[SourceFormat]) -> ConfigError:
    kinds = Counter(suffix_of(name) or "no ending" for name in names)
    seen = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(_SHOWN_KINDS))
    formats = [format_.value for format_ in SourceFormat if format_ is not SourceFormat.AUTO]
    rule = f"could be {' or '.join(found)}" if found else "is of no known format"
    return ConfigError(
        f"path={source.path}, format=auto",
        f"{rule}; it holds {seen or 'no file'}.",
        f"Set format to one of {', '.join(formats)}, or choose files with include.",
    )
