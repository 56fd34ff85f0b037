"""The formats of sources: which one a path has, and who reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_prolong.config.schema.prepare import SourceConfig, SourceFormat
from nemo_prolong.data.sources import huggingface, jsonl, mds_rows, repositories, tables, text
from nemo_prolong.data.sources.base import Item, Unit, Unread
from nemo_prolong.data.sources.detection import detect_format
from nemo_prolong.data.sources.planning import UNIT_BYTES


@dataclass(frozen=True)
class _Reader:
    plan: Callable[[SourceConfig, Path | None, int], list[Unit]]
    read: Callable[[SourceConfig, Unit, Path | None, Unread], Iterator[Item]]


_READERS = {
    SourceFormat.JSONL: _Reader(jsonl.plan, jsonl.read),
    SourceFormat.PARQUET: _Reader(tables.plan_parquet, tables.read_parquet),
    SourceFormat.HUGGINGFACE: _Reader(huggingface.plan, huggingface.read),
    SourceFormat.TEXT: _Reader(text.plan, text.read),
    SourceFormat.REPOSITORIES: _Reader(repositories.plan, repositories.read),
    SourceFormat.TOKENIZED_MDS: _Reader(mds_rows.plan, mds_rows.read_tokenized),
    SourceFormat.PACKED_MDS: _Reader(mds_rows.plan, mds_rows.read_packed),
}


def plan_units(source: SourceConfig, cache: Path | None = None, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Return the units of a source, in order; they follow from the source alone.

    Args:
        source: What to read.
        cache: Directory for copies of remote files; None takes the default.
        unit_bytes: Input of a unit, about.

    Raises:
        ConfigError: If the path does not say what to read (empty, several formats or splits).
        DataError: If nothing is there, or a file that has to be looked at is damaged.
    """
    return _reader(source).plan(source, cache, unit_bytes)


def read_unit(
    source: SourceConfig, unit: Unit, cache: Path | None = None, unread: Unread | None = None
) -> Iterator[Item]:
    """Yield the documents of a unit in order, and what was left out in their place.

    The pieces of a document have to be taken before the next one is asked for, or not at all.
    With ``format=auto`` the source is looked at again for every unit; settle the format before, for many units.

    Args:
        source: What to read.
        unit: A unit of it.
        cache: Directory for copies of remote files; None takes the default.
        unread: Counts what is not read; complete when the last document is there.

    Raises:
        DataError: For a damaged file; for a bad document, where the source refuses those.
    """
    return _reader(source).read(source, unit, cache, Unread() if unread is None else unread)


def _reader(source: SourceConfig) -> _Reader:
    chosen = detect_format(source) if source.format is SourceFormat.AUTO else source.format
    assert chosen in _READERS, f"{chosen} is not read from files"
    return _READERS[chosen]
