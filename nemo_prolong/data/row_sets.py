"""Find row sets on disk: open one, and read what the manifest above it says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.mds.shard import INDEX
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import MANIFEST

_LISTED = 6
_WHAT_TO_GIVE = "Give a directory that scripts/prepare_data.py wrote, one of its row sets, or another MDS directory."


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a data directory, None where there is none.

    A directory with an index is a row set, whatever else lies in it.

    Raises:
        DataError: If it cannot be read.
    """
    path = Path(directory, MANIFEST)
    if is_remote(directory) or not path.is_file() or Path(directory, INDEX).is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if not isinstance(manifest["row_sets"], dict):
            raise TypeError("row_sets is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}", f"is no manifest of a data directory ({error}).", "Prepare the data again."
        ) from error
    return dict(manifest)


def manifest_above(directory: Path) -> dict[str, Any] | None:
    """Return the manifest of a directory above a row set, None where there is none of a data directory.

    Other programs write a ``manifest.json`` too.

    Raises:
        DataError: If it cannot be read.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}", f"cannot be read ({error}).", "Copy it again.") from error
    ours = isinstance(manifest, dict) and isinstance(manifest.get("row_sets"), dict)
    return manifest if ours else None


def refuse_data_directory(directory: str | Path, what: str) -> None:
    """Refuse a data directory where one row set is wanted: read as one, it would mix all of them.

    Args:
        directory: What was named.
        what: The setting that names it.

    Raises:
        DataError: If it is one, with a row set to name instead.
    """
    manifest = read_manifest(directory)
    if manifest is not None:
        listed = ", ".join(list(manifest["row_sets"])[:_LISTED])
        example = Path(directory, next(iter(manifest["row_sets"]), "ROW_SET"))
        raise DataError(
            what, f"is a data directory; its row sets are {listed}.", f"Name one of them, such as {example}."
        )


def open_row_set(directory: str | Path) -> MdsReader:
    """Open one row set.

    Raises:
        DataError: If it is none, or damaged (``MdsReader``).
    """
    if not is_remote(directory) and not Path(directory).is_dir():
        raise DataError(f"{directory}", "is no directory.", _WHAT_TO_GIVE)
    refuse_data_directory(directory, f"{directory}")
    try:
        return MdsReader(directory)
    except DataError as error:
        if is_remote(directory) or any(Path(directory).rglob("index.json")):
            raise
        rule = "is no data directory: it has neither a manifest.json nor an index.json."
        raise DataError(f"{directory}", rule, _WHAT_TO_GIVE) from error


@dataclass(frozen=True)
class KnownFacts:
    """What the manifest above a row set says of it."""

    row_set: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None


def known_facts(directory: str | Path) -> KnownFacts:
    """Look for the data directory that a row set is in; a row set may lie deeper than one level."""
    if is_remote(directory):
        return KnownFacts()
    directory = Path(directory).resolve()
    for root in directory.parents[:3]:
        manifest = manifest_above(root)
        if manifest is not None:
            row_set = manifest["row_sets"].get(directory.relative_to(root).as_posix(), {})
            tokenizer = manifest.get("tokenizer")
            return KnownFacts(row_set, root / tokenizer if tokenizer else None)
    return KnownFacts()
