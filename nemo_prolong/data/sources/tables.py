"""Tables: Parquet files and the Arrow files of ``datasets.save_to_disk``. Only the columns that are needed are read.

Nothing is imported but pyarrow: a ``datasets`` directory is read as the files it is, and no script in it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Document, Rejected, Unit
from nemo_prolong.data.sources.listing import chosen_files
from nemo_prolong.data.sources.planning import units_of_parts
from nemo_prolong.data.sources.records import Fields, listed
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


def read_parquet(source: SourceConfig, unit: Unit, cache: Path | None) -> Iterator[Document | Rejected]:
    """Yield the documents of a unit of row groups.

    Raises:
        DataError: If the file is damaged or lacks a column; for a bad row, where the source refuses those.
    """
    (file,) = unit.files
    path = local_copy(file, cache)
    fields = Fields.of(source)
    with _arrow_errors(file), pq.ParquetFile(path) as table:
        _check_columns(table.schema_arrow, fields, file)
        stop = table.num_row_groups if unit.stop is None else unit.stop
        groups = [table.metadata.row_group(n) for n in range(stop)]
        row = sum(group.num_rows for group in groups[: unit.start])
        for number in range(unit.start, stop):
            group = groups[number]
            batch_rows = max(1, group.num_rows * _BATCH_BYTES // max(group.total_byte_size, _BATCH_BYTES))
            for batch in table.iter_batches(batch_rows, [number], fields.names, use_threads=False):
                yield from _documents(source, fields, batch, file, row)
                row += batch.num_rows


def read_arrow(source: SourceConfig, unit: Unit, cache: Path | None) -> Iterator[Document | Rejected]:
    """Yield the documents of a unit of record batches.

    Raises:
        DataError: If the file is damaged or lacks a column; for a bad row, where the source refuses those.
    """
    (file,) = unit.files
    fields = Fields.of(source)
    with _arrow_errors(file), pa.memory_map(file.path) as mapped:
        stream = pa.ipc.open_stream(mapped)
        _check_columns(stream.schema, fields, file)
        row = 0
        for number, batch in enumerate(stream):
            if unit.stop is not None and number >= unit.stop:
                return
            if number >= unit.start:
                yield from _documents(source, fields, batch.select(fields.names), file, row)
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


def _check_columns(schema: pa.Schema, fields: Fields, file: SourceFile) -> None:
    """Check that the columns are there and hold what a document is made of.

    Raises:
        DataError: If one is missing or of another type, because every row of the file would be bad then.
    """
    for name in fields.names:
        if name not in schema.names:
            rule = f"has no column {name!r}; its columns are {listed(schema.names)}."
            raise DataError(file.path, rule, "Name the right column in the source.")
    column = schema.field(fields.content).type
    if fields.messages is None and not _is_text(column):
        rule = f"has {column} in its column {fields.text!r}, not text."
        raise DataError(file.path, rule, "Name the column of the text: text_field=...")
    if fields.messages is not None and not _is_messages(column):
        rule = f"has {column} in its column {fields.messages!r}, not lists of (role, content)."
        raise DataError(file.path, rule, "Name the column of the messages: messages_field=...")


def _is_text(column: pa.DataType) -> bool:
    if pa.types.is_dictionary(column):
        column = column.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(column) for is_kind in kinds)


def _is_messages(column: pa.DataType) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(column) for is_kind in kinds) and bool(pa.types.is_struct(column.value_type))


def _documents(
    source: SourceConfig, fields: Fields, batch: pa.RecordBatch, file: SourceFile, first_row: int
) -> Iterator[Document | Rejected]:
    columns = {name: batch.column(name) for name in fields.names}
    for index in range(batch.num_rows):
        row = first_row + index
        key = f"{file.name} row {row}"
        try:
            document = fields.document(_record(columns, index), key)
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
        return {name: column[index].as_py() for name, column in columns.items()}
    except UnicodeDecodeError as error:
        rule = f"holds text that is no UTF-8: byte {error.start} is {error.object[error.start]:#04x}."
        raise BadDocument("invalid_utf8", rule, "Write UTF-8.") from error
