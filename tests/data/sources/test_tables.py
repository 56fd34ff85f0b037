"""Parquet files and directories of ``datasets``: rows in, documents out, damage and wrong columns named."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.data.sources.base import Unread
from nemo_prolong.errors import ConfigError, DataError

_MESSAGES = [
    [{"role": "user", "content": "caf\u00e9?"}, {"role": "assistant", "content": "\u4e2d\u6587"}],
    [{"role": "system", "content": ""}],
]


def _save(directory: Path, batches: list[pa.RecordBatch], files: int = 1) -> None:
    """Write what ``datasets.save_to_disk`` writes."""
    directory.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        with pa.OSFile(str(directory / name), "wb") as sink, pa.ipc.new_stream(sink, batches[0].schema) as stream:
            for batch in batches[number::files]:
                stream.write_batch(batch)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text("{}")


def _batches(texts: list[str], rows: int = 2) -> list[pa.RecordBatch]:
    return pa.table({"text": texts, "n": list(range(len(texts)))}).to_batches(max_chunksize=rows)


@pytest.mark.parametrize("unit_bytes", [1, 200, 2**20])
@pytest.mark.parametrize(
    "text_type",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_row_groups_give_their_texts_in_units_of_any_size(tmp_path, read, awkward, unit_bytes, text_type):
    table = pa.table({"text": pa.array(awkward).cast(text_type), "huge": [b"x" * 1000] * len(awkward)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path, unit_bytes=unit_bytes, format="parquet")
    assert found.texts == awkward
    assert [document.key for document in found.documents] == [f"a.parquet row {n}" for n in range(len(awkward))]
    assert found.units == (1 if unit_bytes == 2**20 else 4)


def test_parquet_files_come_sorted_with_groups_from_a_column(tmp_path, read):
    for name in ("b", "a"):
        table = pa.table({"body": [f"{name} one", f"{name} two"], "site": [1, 2]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    found = read(tmp_path, format="parquet", text_field="body", group_field="site")
    assert found.texts == ["a one", "a two", "b one", "b two"]
    assert [document.group for document in found.documents] == ["1", "2", "1", "2"]
    assert read(tmp_path, format="parquet", text_field="body", max_bytes=1).texts == ["a one", "a two"]


def test_lists_of_role_and_content_are_conversations(tmp_path, read):
    pq.write_table(pa.table({"messages": _MESSAGES, "prompt": ["x", "y"]}), tmp_path / "a.parquet")
    found = read(tmp_path, format="parquet", messages_field="messages")
    assert [document.conversation.messages for document in found.documents] == _MESSAGES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no column 'text'; its columns are body, n, messages."),
        ({"text_field": "n"}, "has int64 in its column 'n', not text."),
        ({"text_field": "body", "group_field": "site"}, "has no column 'site'; its columns are body, n, messages."),
        ({"messages_field": "body"}, "has string in its column 'body', not lists of (role, content)."),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_a_wrong_column_is_refused_even_with_dropping(tmp_path, read, settings, said, kind):
    table = pa.table({"body": ["a", "b"], "n": [1, 2], "messages": _MESSAGES})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        _save(tmp_path / "d", table.to_batches())
    with pytest.raises(DataError) as caught:
        read(tmp_path / "d" if kind == "huggingface" else tmp_path, format=kind, on_bad_document="drop", **settings)
    assert caught.value.rule == said
    assert caught.value.what.endswith((".parquet", ".arrow"))


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
@pytest.mark.parametrize(
    "messages",
    [
        pa.list_(pa.map_(pa.string(), pa.string())),
        pa.large_list(pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.binary())])),
        pa.list_(pa.struct([("from", pa.large_string()), ("value", pa.string())])),
        pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))]),
    ],
    ids=str,
)
def test_messages_are_read_whatever_their_column_is(tmp_path, read, kind, messages):
    rows = [[{"role": m["role"], "content": m["content"]} for m in talk] for talk in _MESSAGES]
    values: Any = [[{"from": m["role"], "value": m["content"]} for m in talk] for talk in rows]
    if "from" not in str(messages):
        values = [[{**m, "content": m["content"].encode()} for m in talk] for talk in rows]
    if pa.types.is_struct(messages):
        values = [{key: [m[key] for m in talk] for key in ("role", "content")} for talk in rows]
    elif pa.types.is_map(messages.value_type):
        values = [[list(m.items()) for m in talk] for talk in rows]
    table = pa.table({"messages": pa.array(values, messages)})
    path = tmp_path / "d"
    if kind == "huggingface":
        _save(path, table.to_batches())
    else:
        path.mkdir()
        pq.write_table(table, path / "a.parquet")
    found = read(path, format=kind, messages_field="messages")
    assert [document.conversation.messages for document in found.documents] == rows


def test_null_in_a_struct_is_no_key_and_in_a_map_a_value(tmp_path, read):
    call = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.int64()))])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("weight", pa.int8()), ("tool_calls", pa.list_(call))]
    )
    rows = [
        [
            {"role": "user", "content": "a", "weight": None, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": [("a", 1), ("b", None)]}]},
            {"role": "assistant", "content": "b", "weight": 0, "tool_calls": []},
        ]
    ]
    pq.write_table(pa.table({"messages": pa.array(rows, pa.list_(message)), "tools": [None]}), tmp_path / "a.parquet")
    (document,) = read(tmp_path, format="parquet", messages_field="messages").documents
    assert document.conversation.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": None}}]},
        {"role": "assistant", "content": "b"},
    ]
    assert (document.conversation.trained, document.conversation.variables) == ((True, True, False), {})


def test_a_map_with_a_key_twice_is_refused(tmp_path, read):
    messages = pa.array(
        [[[("role", "user"), ("content", "a"), ("content", "b")]]], pa.list_(pa.map_("string", "string"))
    )
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 0: has a map with a key twice: .*'content'"):
        read(tmp_path, format="parquet", messages_field="messages")


def test_values_that_json_has_not_are_refused_in_tools(tmp_path, read):
    table = pa.table({"messages": _MESSAGES[:1], "tools": [[{"name": "f", "since": datetime(2026, 1, 1)}]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 0: has a datetime in its tools, which JSON has not\."):
        read(tmp_path, format="parquet", messages_field="messages")


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_columns_of_one_name_are_refused(tmp_path, read, kind):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "n", "text"])
    if kind == "huggingface":
        _save(tmp_path / "d", table.to_batches())
    else:
        (tmp_path / "d").mkdir()
        pq.write_table(table, tmp_path / "d" / "a.parquet")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "d", format=kind, on_bad_document="drop")
    assert caught.value.rule == "has several columns called text."


def test_fields_of_one_name_in_messages_are_refused(tmp_path, read):
    message = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["a"]), pa.array(["b"])], ["role", "content", "content"]
    )
    talks = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), message)
    _save(tmp_path / "d", pa.table({"messages": talks}).to_batches())
    with pytest.raises(DataError, match=r"has several fields in column 'messages' called content\."):
        read(tmp_path / "d", format="huggingface", messages_field="messages")


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_columns_that_nobody_reads_are_counted_without_null(tmp_path, kind):
    table = pa.table({"text": ["a", "b", "c"], "score": [1.0, None, 2.0], "empty": pa.array([None] * 3, pa.string())})
    if kind == "huggingface":
        _save(tmp_path / "d", table.to_batches(max_chunksize=2))
    else:
        (tmp_path / "d").mkdir()
        pq.write_table(table, tmp_path / "d" / "a.parquet", row_group_size=2)
    source = SourceConfig(domain="d", path=str(tmp_path / "d"), format=kind)
    unread = Unread()
    for unit in plan_units(source, None, 1):
        list(read_unit(source, unit, None, unread))
    assert +unread.columns == {"score": 2}


def test_bad_bytes_of_a_text_are_named_by_their_place(tmp_path, read):
    pq.write_table(pa.table({"text": pa.array([b"one", b"caf\xe9"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 1: holds text that is no UTF-8: byte 3 is 0xe9\."):
        read(tmp_path, format="parquet")
    assert read(tmp_path, format="parquet", on_bad_document="drop").texts == ["one"]


def test_bad_rows_are_refused_by_number_or_dropped(tmp_path, read):
    texts = pa.array(["one", None, "", b"caf\xe9", "five"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet: row 1: has null in its field 'text', not text\."):
        read(tmp_path, format="parquet")
    found = read(tmp_path, format="parquet", on_bad_document="drop")
    assert found.texts == ["one", "five"]
    assert [(rejected.key, rejected.reason) for rejected in found.rejected] == [
        ("a.parquet row 1", "wrong_type"),
        ("a.parquet row 2", "empty_document"),
        ("a.parquet row 3", "invalid_utf8"),
    ]
    assert found.rejected[2].detail == "holds text that is no UTF-8: byte 3 is 0xe9."


@pytest.mark.parametrize("damage", ["foreign", "cut", "page"])
def test_a_damaged_parquet_file_is_named(tmp_path, read, damage):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), file, compression="zstd", use_dictionary=False)
    data = bytearray(file.read_bytes())
    if damage == "page":
        data[60:90] = bytes(30)
    file.write_bytes({"foreign": b"no parquet at all", "cut": bytes(data[:-5]), "page": bytes(data)}[damage])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read: .+ Copy or write the file again\."):
        read(tmp_path, format="parquet", on_bad_document="drop")


@pytest.mark.parametrize("unit_bytes", [1, 300, 2**20])
def test_a_saved_dataset_gives_its_rows_in_order(tmp_path, read, awkward, unit_bytes):
    _save(tmp_path / "d", _batches(awkward), files=2)
    found = read(tmp_path / "d", unit_bytes=unit_bytes, format="huggingface")
    assert found.texts == awkward[0:2] + awkward[4:6] + awkward[2:4] + awkward[6:]
    assert found.documents[0].key == "data-00000-of-00002.arrow row 0"
    assert found.documents[4].key == "data-00001-of-00002.arrow row 0"


def test_what_the_datasets_library_saves_is_read(tmp_path, read, awkward):
    import datasets  # takes seconds, so only here

    data = datasets.Dataset.from_dict({"text": awkward * 300, "messages": [_MESSAGES[0]] * 300 * len(awkward)})
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path / "d", unit_bytes=2**14, format="huggingface").texts == awkward * 300
    found = read(tmp_path / "d" / "train", format="huggingface", messages_field="messages")
    assert {json.dumps(document.conversation.messages) for document in found.documents} == {json.dumps(_MESSAGES[0])}


def test_several_splits_are_refused_and_one_is_taken(tmp_path, read):
    for split in ("train", "test"):
        _save(tmp_path / "d" / split, _batches([split]))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds the splits train, test\. Name one, such as path=.*/d/train\."):
        read(tmp_path / "d", format="huggingface")
    assert read(tmp_path / "d" / "test", format="huggingface").texts == ["test"]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert read(tmp_path / "d", format="huggingface").texts == ["train"]


def test_parquet_of_the_hub_is_a_dataset_of_one_split(tmp_path, read):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("about")
    for split, number in (("train_sft", 0), ("train_sft", 1), ("test_sft", 0)):
        name = f"{split}-{number:05d}-of-00002-0a1b.parquet"
        pq.write_table(pa.table({"text": [f"{split} {number}"]}), tmp_path / "data" / name)
    for kind in ("auto", "huggingface"):
        with pytest.raises(ConfigError, match=r"holds the splits test_sft, train_sft\. Name one by a pattern"):
            read(tmp_path, format=kind)
        assert read(tmp_path, format=kind, include=["train_sft-*"]).texts == ["train_sft 0", "train_sft 1"]


@pytest.mark.parametrize("cut_bytes", [1, 8, 100, 4000])
def test_a_cut_off_arrow_file_is_refused(tmp_path, read, cut_bytes):
    _save(tmp_path / "d", _batches(["some text " * 100] * 10))
    file = tmp_path / "d" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-cut_bytes])
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: cannot be read: "):
        read(tmp_path / "d", format="huggingface")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "state.json: does not describe a data set"),
        ('{"_data_files": "x"}', "state.json: has no list of _data_files."),
        ('{"_data_files": []}', "is a data set without files."),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', "names a file '../x.arrow', which is not in it."),
        ('{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow: is in state.json but missing."),
    ],
)
def test_a_wrong_state_of_a_saved_dataset_is_refused(tmp_path, read, state, said):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError) as caught:
        read(tmp_path, format="huggingface")
    assert said in str(caught.value)
