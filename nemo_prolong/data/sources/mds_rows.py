"""Tokens that were made before: rows of MDS directories, one document each or packed with spans of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.mds.index import ShardEntry
from nemo_prolong.data.row_sets import refuse_data_directory
from nemo_prolong.data.sources.base import Document, Item, Rejected, Unit, Unread
from nemo_prolong.data.sources.listing import first_files
from nemo_prolong.data.sources.planning import units_of_groups
from nemo_prolong.data.sources.rejection import BadDocument, drop_or_refuse, kind_of
from nemo_prolong.data.sources.token_columns import (
    INPUT_IDS,
    TOKEN_COLUMNS,
    check_bounds,
    check_length,
    check_positions,
    check_unpadded,
    mask_of,
    tokens_of,
)
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import is_remote
from nemo_prolong.data.stored_row import SPANS, StoredRow
from nemo_prolong.errors import DataError


@dataclass(frozen=True)
class _Shard:
    """A shard as a source file.

    Attributes:
        file: The file that is read, compressed or not.
        first_row: Its first row, counted in the directory.
        rows: Number of its rows.
    """

    file: SourceFile
    first_row: int
    rows: int


def plan(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: whole shards, or ranges of rows of one shard that is larger than a unit.

    ``start`` and ``stop`` count rows of the unit's files.

    Raises:
        DataError: If the directory is no MDS, holds several row sets, has no rows, or has no tokens.
    """
    refuse_data_directory(source.path, f"path={source.path}")
    _opened.cache_clear()
    reader, by_name = _opened(source.path, cache)
    if not len(reader):
        raise DataError(f"path={source.path}", "has no rows.", "Check the path.")
    reader.require_columns(*(name for name in (INPUT_IDS, source.group_field) if name is not None))
    shards = list(by_name.values())
    taken = len(first_files([shard.file for shard in shards], source.max_bytes))
    return list(_units(shards[:taken], unit_bytes))


def read_tokenized(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield every row as a document.

    Raises:
        DataError: For a damaged shard; for a bad row, where the source refuses those.
    """
    for number, row in _rows(source, unit, cache):
        key = f"{_name(source)} row {number}"
        try:
            ids, mask = tokens_of(row[INPUT_IDS], _beside(source, row))
            _check_not_packed(source, row)
            document = Document(key, _group(source, row, key), input_ids=ids, mask=mask)
        except BadDocument as bad:
            yield _rejected(source, bad, number, row)
            continue
        yield document
    unread.columns.update(_unread(source, unit, cache))


def read_packed(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield every span of every row as a document, the whole row where it has no spans.

    A bad row is bad as a whole: where its documents begin is what is wrong.

    Raises:
        DataError: For a damaged shard; for a bad row, where the source refuses those.
    """
    for number, row in _rows(source, unit, cache):
        key = f"{_name(source)} row {number}"
        try:
            ids, mask, spans = _packed(source, row)
            groups = [_group(source, row, name) for name in _span_keys(key, spans)]
        except BadDocument as bad:
            yield _rejected(source, bad, number, row)
            continue
        for (start, stop), name, group in zip(spans or [(0, len(ids))], _span_keys(key, spans), groups, strict=True):
            part = None if mask is None else mask[start:stop]
            yield Document(name, group, input_ids=ids[start:stop], mask=part, whole=False)
    unread.columns.update(_unread(source, unit, cache))


def _span_keys(key: str, spans: Sequence[tuple[int, int]] | None) -> list[str]:
    return [key] if spans is None else [f"{key} span {number}" for number in range(len(spans))]


def _packed(
    source: SourceConfig, row: dict[str, Any]
) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]] | None, list[tuple[int, int]] | None]:
    """Return tokens, integers [T], mask, uint8 [T] or None, and spans, or None, of a packed row.

    Raises:
        BadDocument: If training would refuse the row, or the columns contradict each other.
    """
    beside = _beside(source, row)
    # Of the other columns the preparation reads more than training does.
    stored = StoredRow.of({name: row[name] for name in (INPUT_IDS, SPANS) if name in row})
    for fault in stored.faults:
        raise BadDocument(*fault)
    ids = stored.ids
    check_length(beside, len(ids))
    mask = mask_of(ids, beside)
    check_unpadded(beside, len(ids))
    spans = [(start, stop) for start, stop in stored.spans.tolist()]
    check_bounds(beside, spans)
    check_positions(beside, spans)
    return ids, mask, spans if SPANS in row else None


def _check_not_packed(source: SourceConfig, row: dict[str, Any]) -> None:
    """Check that a row that is read as one document is one.

    Raises:
        BadDocument: If its spans say otherwise.
    """
    if SPANS in row and SPANS not in source.ignore_fields and len(row[SPANS]) > 1:
        rule = f"holds {len(row[SPANS])} documents by its {SPANS}, and is read as one."
        raise BadDocument("bad_spans", rule, f"Set format=packed_mds, or ignore_fields=[{SPANS}].")


def _beside(source: SourceConfig, row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in TOKEN_COLUMNS if name in row and name not in source.ignore_fields}


def _unread(source: SourceConfig, unit: Unit, cache: Path | None) -> dict[str, int]:
    """Return the columns that are not read, each with the rows of the unit."""
    reader, _ = _opened(source.path, cache)
    start, stop = _bounds(source, unit, cache)
    about = {name for name in (SPANS, *TOKEN_COLUMNS) if name not in source.ignore_fields}
    taken = {INPUT_IDS, source.group_field, *about}
    return {name: stop - start for name in reader.columns if name not in taken}


def _group(source: SourceConfig, row: dict[str, Any], key: str) -> str:
    if source.group_field is None:
        return key
    value = row[source.group_field]
    if not isinstance(value, str | int | np.integer):
        rule = f"has {kind_of(value)} in its column {source.group_field!r}, which is to name its group."
        raise BadDocument("wrong_type", rule, "Name a column of text or whole numbers: group_field=...")
    return str(value)


def _rejected(source: SourceConfig, bad: BadDocument, number: int, row: dict[str, Any]) -> Rejected:
    num_bytes = int(np.asarray(row[INPUT_IDS]).nbytes)
    return drop_or_refuse(source, bad, f"{_name(source)} row {number}", f"{source.path}: row {number}", num_bytes)


def _rows(source: SourceConfig, unit: Unit, cache: Path | None) -> Iterator[tuple[int, dict[str, Any]]]:
    reader, _ = _opened(source.path, cache)
    for number in range(*_bounds(source, unit, cache)):
        yield number, reader[number]


def _bounds(source: SourceConfig, unit: Unit, cache: Path | None) -> tuple[int, int]:
    """Return the first row of a unit and the one after its last, counted in the directory."""
    _, shards = _opened(source.path, cache)
    first, last = shards[unit.files[0].name], shards[unit.files[-1].name]
    stop = last.first_row + last.rows if unit.stop is None else first.first_row + unit.stop
    return first.first_row + unit.start, stop


@lru_cache(maxsize=2)
def _opened(path: str, cache: Path | None) -> tuple[MdsReader, dict[str, _Shard]]:
    """Return the reader of a directory and its shards by file name, in order.

    Kept from unit to unit: the index of a corpus has ten thousand shards, and to fetch and check it takes as long as to
    read a unit. Planning looks at the directory anew.
    """
    reader = MdsReader(path, cache)
    first_rows = accumulate((shard.rows for shard in reader.shards), initial=0)
    shards = [
        _Shard(_file_of(reader, shard), first_row, shard.rows)
        for shard, first_row in zip(reader.shards, first_rows, strict=False)
    ]
    return reader, {shard.file.name: shard for shard in shards}


def _units(shards: Sequence[_Shard], unit_bytes: int) -> Iterator[Unit]:
    small: list[tuple[SourceFile]] = []
    for shard in shards:
        if shard.file.num_bytes <= unit_bytes:
            small.append((shard.file,))
            continue
        yield from units_of_groups(small, unit_bytes)
        small = []
        rows = max(1, shard.rows * unit_bytes // shard.file.num_bytes)
        for start in range(0, shard.rows, rows):
            stop = min(start + rows, shard.rows)
            yield Unit((shard.file,), start, stop, shard.file.num_bytes * (stop - start) // shard.rows)
    yield from units_of_groups(small, unit_bytes)


def _file_of(reader: MdsReader, shard: ShardEntry) -> SourceFile:
    """Return the file that the rows of a shard come from; where both are there, the reader takes the uncompressed."""
    file = shard.raw
    if shard.packed is not None and (is_remote(reader.directory) or not Path(reader.directory, file.name).exists()):
        file = shard.packed
    return SourceFile(f"{reader.directory}/{file.name}", file.name, file.num_bytes)


def _name(source: SourceConfig) -> str:
    return PurePosixPath(source.path).name
