"""Directories of the Hugging Face ``datasets`` library: what ``save_to_disk`` writes, and Parquet as the Hub stores it.

One split is read. Where a directory holds several, the source's path has to name one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Item, Unit, Unread
from nemo_prolong.data.sources.listing import chosen_files, first_files
from nemo_prolong.data.sources.rejection import listed
from nemo_prolong.data.sources.tables import (
    arrow_units,
    is_parquet,
    parquet_units,
    read_arrow,
    read_parquet,
)
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import is_remote
from nemo_prolong.errors import ConfigError, DataError

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_SELECTIONS = ("_indices_files", "_indices_data_files")
_HUB_NAME = re.compile(r"(?P<split>.+?)-\d+-of-\d+")
_SPLIT_DIRECTORIES = frozenset({"train", "test", "validation", "valid", "val", "dev"})


def plan(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: record batches or row groups.

    Raises:
        ConfigError: If the directory holds several splits.
        DataError: If it is no such directory, or a file is damaged.
    """
    if is_remote(source.path) or not is_saved(source.path):
        return parquet_units(_hub_files(source), unit_bytes)
    return arrow_units(first_files(_arrow_files(_one_split(source.path)), source.max_bytes), unit_bytes)


def read(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield the documents of a unit; raises what the readers of tables raise."""
    reader = read_parquet if is_parquet(unit.files[0].name) else read_arrow
    return reader(source, unit, cache, unread)


def is_saved(path: str) -> bool:
    """Return whether ``save_to_disk`` wrote a directory."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (_STATE, _SPLITS))


def hub_splits(names: list[str]) -> list[str]:
    """Return the splits that names of Parquet files tell of, as ``data/train-00000-of-00002.parquet`` does."""
    splits = set()
    for name in map(PurePosixPath, names):
        if match := _HUB_NAME.match(name.stem):
            splits.add(match["split"])
        elif name.parent.name in _SPLIT_DIRECTORIES:
            splits.add(name.parent.name)
    return sorted(splits)


def _hub_files(source: SourceConfig) -> list[SourceFile]:
    files = chosen_files(source, is_parquet, "dataset (state.json with Arrow files, or Parquet files)")
    splits = hub_splits([file.name for file in files])
    if len(splits) > 1:
        raise ConfigError(
            f"path={source.path}",
            f"holds the splits {listed(splits)}.",
            f"Name one by a pattern, such as include=['*{splits[-1]}*'].",
        )
    return files


def _one_split(path: str) -> str:
    """Return the directory of the only split.

    Raises:
        ConfigError: If there are several.
        DataError: If the directory is a data set and a dictionary of data sets at once.
    """
    if not os.path.isfile(os.path.join(path, _SPLITS)):
        return path
    if os.path.isfile(os.path.join(path, _STATE)):
        rule = f"has a {_STATE} and a {_SPLITS}: two data sets were saved into one directory."
        raise DataError(path, rule, f"Save each into a directory of its own, or remove {_SPLITS}.")
    splits = [str(split) for split in _described(path, _SPLITS, "splits")]
    if len(splits) != 1:
        example = f"path={os.path.join(path, splits[0] if splits else 'train')}"
        raise ConfigError(f"path={path}", f"holds the splits {listed(splits)}.", f"Name one, such as {example}.")
    return os.path.join(path, _checked_name(path, splits[0]))


def _arrow_files(path: str) -> list[SourceFile]:
    _refuse_selection(path)
    names = [
        _checked_name(path, entry.get("filename") if isinstance(entry, dict) else entry)
        for entry in _described(path, _STATE, "_data_files")
    ]
    files = []
    for name in names:
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            raise DataError(file, f"is in {_STATE} but missing.", "Copy or write the data set again.")
        files.append(SourceFile(file, name, os.path.getsize(file)))
    if not files:
        raise DataError(path, "is a data set without files.", "Write it again.")
    return files


def _refuse_selection(path: str) -> None:
    """Refuse a data set of an old version that kept which rows were selected in files of their own."""
    state = _json_object(path, _STATE)
    for key in _SELECTIONS:
        if state.get(key):
            raise DataError(
                os.path.join(path, _STATE),
                f"selects rows by {key}, and all rows of the files would be read.",
                "Load it with the version of datasets that wrote it, and save flatten_indices() of it.",
            )


def _json_object(path: str, name: str) -> dict[str, Any]:
    """Return one of the JSON files of a data set.

    Raises:
        DataError: If it is no object.
    """
    file = os.path.join(path, name)
    try:
        content = json.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(file, f"does not describe a data set ({error!r}).", "Write it again.") from error
    if not isinstance(content, dict):
        raise DataError(file, "does not describe a data set.", "Write it again.")
    return content


def _described(path: str, name: str, key: str) -> list[Any]:
    """Return a list from one of the JSON files of a data set.

    Raises:
        DataError: If the file does not hold it.
    """
    file = os.path.join(path, name)
    try:
        value = _json_object(path, name)[key]
    except KeyError as error:
        raise DataError(file, f"does not describe a data set ({error!r}).", "Write it again.") from error
    if not isinstance(value, list):
        raise DataError(file, f"has no list of {key}.", "Write the data set again.")
    return value


def _checked_name(path: str, name: Any) -> str:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(path, f"names a file {name!r}, which is not in it.", "Use the data set as it was written.")
    return name
