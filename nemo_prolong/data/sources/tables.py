"""Tables: Parquet files and the Arrow files of ``datasets.save_to_disk``.

Only the columns that are needed are read. The others are counted without reading them. Nothing is imported but pyarrow:
a ``datasets`` directory is read as the files it is, and no script in it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Item, Unit, Unread
from nemo_prolong.data.sources.column_types import check_schema, plain_value, top_column
from nemo_prolong.data.sources.listing import chosen_files
from nemo_prolong.data.sources.planning import units_of_parts
from nemo_prolong.data.sources.records import RecordReader
from nemo_prolong.data.sources.rejection import BadDocument, drop_or_refuse
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.data.storage.remote import is_remote, local_copy
from nemo_prolong.errors import DataError

PARQUET_SUFFIX = ".parquet"
_BATCH_BYTES = 2**23
"""Text decoded from a row group at once, about."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def is_parquet(name: str) -> bool:
    """Return whether a file name is one of Parquet."""
    return name.lower().endswith(PARQUET_SUFFIX)


def plan_parquet(source: SourceConfig, cache: Path | None, unit_bytes: int) -> list[Unit]:
    """Return the units: row groups of local files, whole remote ones (planning fetches nothing).

    Raises:
        DataError: If a file is no Parquet, or lacks a column.
    """
    return parquet_units(chosen_files(source, is_parquet, "Parquet file (*.parquet)"), unit_bytes)


def parquet_units(files: Iterable[SourceFile], unit_bytes: int) -> list[Unit]:
    """Return the units of Parquet files."""
    units: list[Unit] = []
    for file in files:
        if is_remote(file.path):
            units.append(Unit((file,), num_bytes=file.num_bytes))
            continue
        with _arrow_errors(file), pq.ParquetFile(file.path) as table:
            groups = [table.metadata.row_group(n).total_byte_size for n in range(table.num_row_groups)]
        units += units_of_parts(file, groups, unit_bytes)
    return units


def read_parquet(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield the documents of a unit of row groups.

    Raises:
        DataError: If the file is damaged or lacks a column; for a bad row, where the source refuses those.
    """
    (file,) = unit.files
    path = local_copy(file, cache)
    records = RecordReader(source, unread)
    with _arrow_errors(file), pq.ParquetFile(path) as table:
        check_schema(table.schema_arrow, source, records, file)
        columns = _columns(table.schema_arrow, records)
        stop = table.num_row_groups if unit.stop is None else unit.stop
        groups = [table.metadata.row_group(n) for n in range(stop)]
        row = sum(group.num_rows for group in groups[: unit.start])
        for number in range(unit.start, stop):
            group = groups[number]
            batch_rows = max(1, group.num_rows * _BATCH_BYTES // max(group.total_byte_size, _BATCH_BYTES))
            for batch in table.iter_batches(batch_rows, [number], columns, use_threads=False):
                yield from _documents(source, records, batch, file, row)
                row += batch.num_rows
            unread.columns.update(_unread(table.schema_arrow, records, group))


def read_arrow(source: SourceConfig, unit: Unit, cache: Path | None, unread: Unread) -> Iterator[Item]:
    """Yield the documents of a unit of record batches.

    Raises:
        DataError: If the file is damaged or lacks a column; for a bad row, where the source refuses those.
    """
    (file,) = unit.files
    records = RecordReader(source, unread)
    with _arrow_errors(file), pa.memory_map(file.path) as mapped:
        stream = pa.ipc.open_stream(mapped)
        check_schema(stream.schema, source, records, file)
        columns = list(dict.fromkeys(top_column(name, stream.schema) for name in _columns(stream.schema, records)))
        row = 0
        for number, batch in enumerate(stream):
            if unit.stop is not None and number >= unit.stop:
                break
            if number >= unit.start:
                yield from _documents(source, records, batch.select(columns), file, row)
                left = [name for name in batch.schema.names if records.is_unread(name)]
                unread.columns.update({name: batch.num_rows - batch.column(name).null_count for name in left})
            row += batch.num_rows


def arrow_units(files: Iterable[SourceFile], unit_bytes: int) -> list[Unit]:
    """Return the units of Arrow streams: record batches, whose headers are walked through without reading the data.

    Raises:
        DataError: If a file is no Arrow stream, or is cut off.
    """
    units: list[Unit] = []
    for file in files:
        with _arrow_errors(file), pa.memory_map(file.path) as mapped:
            batches = [batch.nbytes for batch in pa.ipc.open_stream(mapped)]
            mapped.seek(max(0, file.num_bytes - len(_END_OF_STREAM)))
            if mapped.read() != _END_OF_STREAM:
                # A stream that stops between two batches reads like a complete one.
                raise pa.ArrowInvalid("its end-of-stream mark is missing")
        units += units_of_parts(file, batches, unit_bytes)
    return units


@contextmanager
def _arrow_errors(file: SourceFile) -> Iterator[None]:
    """Turn errors of Arrow into ours.

    Raises:
        DataError: If the file is damaged, of another format, or cannot be read.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise DataError(file.path, f"cannot be read: {reason}.", "Copy or write the file again.") from error


def _columns(schema: pa.Schema, records: RecordReader) -> list[str]:
    """Return the columns to read, ``a.b`` for a part of one; what stands beside the contents only where it is there."""
    return [*records.needed, *(name for name in records.beside if name in schema.names)]


def _unread(schema: pa.Schema, records: RecordReader, group: pq.RowGroupMetaData) -> dict[str, int]:
    """Return how many rows of a group have a value in each column that is not read, as far as the file tells."""
    nulls: dict[str, int] = {}
    for number in range(group.num_columns):
        column = group.column(number)
        if column.statistics is not None and column.statistics.has_null_count:
            nulls[column.path_in_schema] = column.statistics.null_count
    return {name: group.num_rows - nulls.get(name, 0) for name in schema.names if records.is_unread(name)}


def _documents(
    source: SourceConfig, records: RecordReader, batch: pa.RecordBatch, file: SourceFile, first_row: int
) -> Iterator[Item]:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    for index in range(batch.num_rows):
        row = first_row + index
        key = f"{file.name} row {row}"
        try:
            document = records.document(_record(columns, index), key)
        except BadDocument as bad:
            yield drop_or_refuse(source, bad, key, f"{file.path}: row {row}", 0)
            continue
        yield document


def _record(columns: dict[str, pa.Array], index: int) -> dict[str, Any]:
    """Return one row.

    Raises:
        BadDocument: If its text is no UTF-8, which writers of tables need not check.
    """
    try:
        return {name: plain_value(column[index]) for name, column in columns.items()}
    except UnicodeDecodeError as error:
        rule = f"holds text that is no UTF-8: byte {error.start} is {error.object[error.start]:#04x}."
        raise BadDocument("invalid_utf8", rule, "Write UTF-8.") from error
