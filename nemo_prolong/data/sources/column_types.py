"""Columns of Arrow: which types hold text, messages and tokens, and their values as those of JSON.

Writers choose among many types for one thing. Text may be ``string``, ``large_string``, ``string_view``, the same of
bytes, or a dictionary of those. Messages may be structs or maps in any kind of list, or what ``datasets`` makes of a
``Sequence`` of features, a struct of lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.records import RecordReader, root_of
from nemo_prolong.data.sources.rejection import BadDocument, listed
from nemo_prolong.data.storage.files import SourceFile
from nemo_prolong.errors import DataError

_TYPES = pa.types
_STRINGS = (_TYPES.is_string, _TYPES.is_large_string, _TYPES.is_string_view)
_BYTES = (_TYPES.is_binary, _TYPES.is_large_binary, _TYPES.is_binary_view)
_LISTS = (
    _TYPES.is_list,
    _TYPES.is_large_list,
    _TYPES.is_fixed_size_list,
    _TYPES.is_list_view,
    _TYPES.is_large_list_view,
)


def check_schema(schema: pa.Schema, source: SourceConfig, records: RecordReader, file: SourceFile) -> None:
    """Check that the columns are there, once each, and hold what a document is made of.

    Raises:
        DataError: If one is missing, is there twice or is of another type, because every row of the file would be bad
            then.
    """
    _check_names(schema.names, "columns", file)
    for name in records.needed:
        column = _type_of(name, schema)
        if column is None:
            rule = f"has no column {name!r}; its columns are {listed(schema.names)}."
            raise DataError(file.path, rule, "Name the right column in the source.")
        _check_structs(column, name, file)
        if name in records.contents:
            _check_content(column, name, source, file)
    for name in records.beside:
        if name in schema.names:
            _check_structs(schema.field(name).type, name, file)


def top_column(name: str, schema: pa.Schema) -> str:
    """Return the column of the table that holds ``name``, which is ``a`` for ``a.b``."""
    return name if name in schema.names else root_of(name)


def plain_value(scalar: pa.Scalar) -> Any:
    """Return a value as JSON would hold it, lists of numbers as arrays.

    Null in a struct is a field that another row has, so the key is left out. Null in a map was written, and stays.

    Raises:
        UnicodeDecodeError: If its text is no UTF-8.
        BadDocument: If a map has a key twice.
    """
    data_type = _unwrapped(scalar.type)
    if not scalar.is_valid:
        return None
    if _is_numbers(data_type) and _is_list(scalar.type):
        return scalar.values.to_numpy(zero_copy_only=False)
    try:
        value = scalar.as_py(maps_as_pydicts="strict")
    except KeyError as error:
        rule = f"has a map with a key twice: {error.args[0]}."
        raise BadDocument("duplicate_key", rule, "Write each key once.") from error
    return _plain(value, data_type)


def _plain(value: Any, data_type: pa.DataType) -> Any:
    data_type = _unwrapped(data_type)
    if value is None or _is_any(data_type, _STRINGS):
        return value
    if _is_any(data_type, _BYTES):
        return value.decode()
    if _TYPES.is_struct(data_type):
        fields = {field.name: field.type for field in data_type}
        if _is_struct_of_lists(data_type):
            return _messages_of_lists(value, fields)
        return {name: _plain(item, fields[name]) for name, item in value.items() if item is not None}
    if _is_list(data_type):
        return [_plain(item, data_type.value_type) for item in value]
    if _TYPES.is_map(data_type):
        return {_plain(key, data_type.key_type): _plain(item, data_type.item_type) for key, item in value.items()}
    return value


def _messages_of_lists(value: dict[str, Any], fields: dict[str, pa.DataType]) -> Any:
    """Return the list of objects that a struct of lists is; the struct as it is where its lists differ in length."""
    lists = {name: item for name, item in value.items() if item is not None}
    lengths = {len(item) for item in lists.values()}
    if len(lengths) != 1:
        return {name: _plain(item, fields[name]) for name, item in lists.items()}
    return [
        {name: _plain(item[n], fields[name].value_type) for name, item in lists.items() if item[n] is not None}
        for n in range(lengths.pop())
    ]


def _check_content(column: pa.DataType, name: str, source: SourceConfig, file: SourceFile) -> None:
    if source.tokens_field is not None:
        if not _is_numbers(column):
            rule = f"has {column} in its column {name!r}, not lists of token ids."
            raise DataError(file.path, rule, "Name the column of the tokens: tokens_field=...")
    elif not source.holds_conversations:
        if not _is_text(column):
            rule = f"has {column} in its column {name!r}, not text."
            remedy = "Name the column of the text: text_field=..."
            if _is_numbers(column):
                remedy = f"For token ids set tokens_field={name}. {remedy}"
            raise DataError(file.path, rule, remedy)
    elif source.messages_field is not None:
        if not _is_messages(column):
            rule = f"has {column} in its column {name!r}, not lists of (role, content)."
            raise DataError(file.path, rule, "Name the column of the messages: messages_field=...")
    elif not _is_text(column) and not _is_messages(column):
        rule = f"has {column} in its column {name!r}, not text and no lists of (role, content)."
        raise DataError(file.path, rule, "Name the columns: prompt_field=..., completion_field=...")


def _check_names(names: Sequence[str], what: str, file: SourceFile) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        rule = f"has several {what} called {listed(twice)}."
        raise DataError(file.path, rule, "Write the file with a name of its own for each.")


def _check_structs(data_type: pa.DataType, name: str, file: SourceFile) -> None:
    """Check that no struct within a column has a field twice."""
    data_type = _unwrapped(data_type)
    if _TYPES.is_struct(data_type):
        _check_names([field.name for field in data_type], f"fields in column {name!r}", file)
        for field in data_type:
            _check_structs(field.type, name, file)
    elif _is_list(data_type):
        _check_structs(data_type.value_type, name, file)
    elif _TYPES.is_map(data_type):
        _check_structs(data_type.item_type, name, file)


def _type_of(name: str, schema: pa.Schema) -> pa.DataType | None:
    """Return the type of a column, or of a part of one; None where it is not there."""
    if name in schema.names:
        return schema.field(name).type
    head, *rest = name.split(".")
    if head not in schema.names:
        return None
    data_type = schema.field(head).type
    for part in rest:
        if not _TYPES.is_struct(data_type) or data_type.get_field_index(part) < 0:
            return None
        data_type = data_type.field(part).type
    return data_type


def _unwrapped(data_type: pa.DataType) -> pa.DataType:
    """Return the type of the values, where a type says how they are stored."""
    while True:
        if isinstance(data_type, pa.BaseExtensionType):
            data_type = data_type.storage_type
        elif _TYPES.is_dictionary(data_type) or _TYPES.is_run_end_encoded(data_type):
            data_type = data_type.value_type
        else:
            return data_type


def _is_text(data_type: pa.DataType) -> bool:
    return _is_any(_unwrapped(data_type), (*_STRINGS, *_BYTES))


def _is_messages(data_type: pa.DataType) -> bool:
    data_type = _unwrapped(data_type)
    if _is_struct_of_lists(data_type):
        return True
    if not _is_list(data_type):
        return False
    of = _unwrapped(data_type.value_type)
    return bool(_TYPES.is_struct(of) or _TYPES.is_map(of))


def _is_struct_of_lists(data_type: pa.DataType) -> bool:
    return (
        bool(_TYPES.is_struct(data_type))
        and data_type.num_fields > 1
        and all(_is_list(field.type) for field in data_type)
    )


def _is_numbers(data_type: pa.DataType) -> bool:
    return _is_list(data_type) and bool(
        _TYPES.is_integer(data_type.value_type) or _TYPES.is_boolean(data_type.value_type)
    )


def _is_list(data_type: pa.DataType) -> bool:
    return _is_any(data_type, _LISTS)


def _is_any(data_type: pa.DataType, kinds: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(is_kind(data_type) for is_kind in kinds)
