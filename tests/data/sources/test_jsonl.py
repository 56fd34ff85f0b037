"""JSON lines: what comes back, in units of any size, and what is said of a bad line."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("error")


def _lines(texts: list[str], ensure_ascii: bool = False) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ensure_ascii) + "\n" for text in texts).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_every_compression_gives_the_texts_that_were_written(tmp_path, read, awkward, name, ensure_ascii):
    data = _lines(awkward, ensure_ascii)
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(data))
    assert read(tmp_path / name, format="jsonl").texts == awkward


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_several_compressed_members_are_read_as_one_file(tmp_path, read, compress):
    ending = "gz" if compress is gzip.compress else "zst"
    data = _lines(["one", "two", "three"])
    (tmp_path / f"a.{ending}").write_bytes(compress(data[:20]) + compress(data[20:]) + compress(b""))
    found = read(tmp_path, format="jsonl")
    assert found.texts == ["one", "two", "three"]
    assert [document.key for document in found.documents] == [f"a.{ending}:{number}" for number in (1, 2, 3)]


def test_line_ends_and_a_mark_at_the_start_do_not_matter(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}\n\n{"text": "three"}')
    found = read(file, format="jsonl")
    assert found.texts == ["one", "two", "three"]
    assert [document.key for document in found.documents] == ["a.jsonl@3", "a.jsonl@26", "a.jsonl@43"]
    assert file.read_bytes()[43:] == b'{"text": "three"}'


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1, max_size=12
    ),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]), min_size=12, max_size=12),
    mark=st.booleans(),
    last_newline=st.booleans(),
    unit_bytes=st.integers(1, 200),
)
def test_units_of_any_size_give_the_same_documents(tmp_path, read, records, ends, mark, last_newline, unit_bytes):
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in records]
    data = b"\xef\xbb\xbf" * mark + b"".join(line + end for line, end in zip(lines, ends, strict=False))
    (tmp_path / "a.jsonl").write_bytes(data if last_newline else data.rstrip(b"\r\n \t"))
    whole = read(tmp_path, unit_bytes=2**20, format="jsonl")
    parts = read(tmp_path, unit_bytes=unit_bytes, format="jsonl")
    assert parts.texts == whole.texts == records
    assert [document.key for document in parts.documents] == [document.key for document in whole.documents]


def test_files_of_a_directory_come_sorted_without_hidden_ones(tmp_path, read):
    for name in ("b/2.jsonl", "a.jsonl", "b/10.jsonl", ".hidden/x.jsonl", "b/.y.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_lines([name]))
    assert read(tmp_path, format="jsonl").texts == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert read(tmp_path / "b" / "*.jsonl", format="jsonl").texts == ["b/10.jsonl", "b/2.jsonl"]
    assert read(tmp_path, format="jsonl", include=["2*"]).texts == ["b/2.jsonl"]
    assert read(tmp_path, format="jsonl", max_bytes=1).texts == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "reason", "said"),
    [
        ('{"text": "a"', "invalid_json", "is no JSON: Expecting ',' delimiter at column 13."),
        ('{"text": "a"} x', "invalid_json", "is no JSON: Extra data at column 15."),
        ("[", "invalid_json", "is no JSON: Expecting value at column 2."),
        ('{"text": ' + "[" * 100_000, "invalid_json", "holds JSON that cannot be read"),
        ('{"n": ' + "1" * 5000 + "}", "invalid_json", "holds JSON that cannot be read"),
        ('["text"]', "wrong_type", "holds a list, not an object."),
        ('{"body": "a", "id": 3}', "missing_field", "has no field 'text'; its fields are body, id."),
        ("{}", "missing_field", "has no field 'text'; its fields are none."),
        ('{"text": null}', "wrong_type", "has null in its field 'text', not text."),
        ('{"text": 1}', "wrong_type", "has a number in its field 'text', not text."),
        ('{"text": ""}', "empty_document", "has no text in its field 'text'."),
        (
            '{"text": "a", "text": "b"}',
            "duplicate_key",
            "holds JSON in which an object has the key 'text' more than once.",
        ),
        (r'{"text": "\ud83d"}', "invalid_utf8", r"has half of a surrogate pair, '\ud83d', as character 0 of a text."),
    ],
)
def test_a_bad_line_is_refused_by_number_or_dropped(tmp_path, read, line, reason, said):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n' + line + '\n{"text": "four"}\n', "utf-8")
    for unit_bytes in (5, 2**20):
        with pytest.raises(DataError) as caught:
            read(file, unit_bytes=unit_bytes, format="jsonl")
        assert caught.value.what == f"{file}:3"
        assert said in caught.value.rule
        assert "on_bad_document=drop" in caught.value.remedy
    found = read(file, format="jsonl", on_bad_document="drop")
    assert found.texts == ["one", "four"]
    (rejected,) = found.rejected
    assert (rejected.key, rejected.reason, rejected.num_bytes) == ("a.jsonl@17", reason, len(line) + 1)
    assert said in rejected.detail


def test_a_pair_of_surrogates_is_a_character(tmp_path, read):
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00"}')
    assert read(tmp_path, format="jsonl").texts == ["\U0001f600"]


def test_invalid_utf8_is_named_with_its_byte_in_the_file(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError) as caught:
        read(file, format="jsonl")
    assert caught.value.what == f"{file}:2"
    assert "byte 29 of the file is 0xe9" in caught.value.rule
    assert file.read_bytes()[29] == 0xE9


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_cut_off_compressed_file_is_refused_after_its_lines(tmp_path, read, ending):
    texts = [f"text number {number} " * 50 for number in range(3000)]
    data = (gzip.compress if ending == "gz" else zstandard.compress)(_lines(texts))
    file = tmp_path / f"a.jsonl.{ending}"
    file.write_bytes(data[:-9])
    with pytest.raises(DataError, match=r"after line \d+: cannot be read on") as caught:
        read(file, format="jsonl", on_bad_document="drop")
    assert str(file) in caught.value.what


def test_a_wrongly_named_compressed_file_is_refused(tmp_path, read):
    (tmp_path / "a.zst").write_bytes(_lines(["one"]))
    with pytest.raises(DataError, match="cannot be read on"):
        read(tmp_path, format="jsonl")


def test_bad_lines_of_a_compressed_file_have_line_numbers(tmp_path, read):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{}\n'))
    with pytest.raises(DataError, match=r"a\.gz:3: has no field 'text'"):
        read(tmp_path, format="jsonl")
    assert read(tmp_path, format="jsonl", on_bad_document="drop").rejected[0].key == "a.gz:3"


def test_groups_come_from_their_field(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "site": "x.org"}\n{"text": "b", "site": 7}\n')
    assert [d.group for d in read(tmp_path, format="jsonl", group_field="site").documents] == ["x.org", "7"]
    assert [d.group for d in read(tmp_path, format="jsonl").documents] == ["a.jsonl@0", "a.jsonl@31"]
    (tmp_path / "a.jsonl").write_text('{"text": "a", "site": null}\n')
    with pytest.raises(DataError, match="has null in its field 'site', which is to name its group"):
        read(tmp_path, format="jsonl", group_field="site")


def test_conversations_are_read_without_the_fields_beside_them(tmp_path, read):
    messages = [{"content": "caf\u00e9?", "role": "user"}, {"role": "assistant", "content": ""}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "prompt": "unused"}))
    (document,) = read(tmp_path, format="jsonl", messages_field="messages").documents
    assert json.dumps(document.conversation.messages) == json.dumps(
        [{"role": "user", "content": "caf\u00e9?"}, {"role": "assistant", "content": ""}]
    )
    assert document.pieces is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "has text in its field 'messages', not a list of messages."),
        ([], "has no message in its field 'messages'."),
        ([{"role": "user", "content": "a"}, "b"], "has text as message 1, not an object with role and content."),
        ([{"text": "a"}], "has no 'role' in message 0, only text."),
        ([{"role": "user", "content": ["a"]}], "has a list as 'content' of message 0 with text in it, not text and no"),
        ([{"role": "user", "content": "\udfff"}], "has half of a surrogate pair"),
    ],
)
def test_a_bad_conversation_is_named_with_its_message(tmp_path, read, messages: Any, said):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError) as caught:
        read(file, format="jsonl", messages_field="messages")
    assert (caught.value.what, said in caught.value.rule) == (f"{file}:1", True)


def test_missing_and_empty_paths_are_refused(tmp_path, read):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: "):
        read(tmp_path / "nowhere.jsonl", format="jsonl")
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"holds no file of JSON lines \(\*\.jsonl"):
        read(tmp_path, format="jsonl")
    with pytest.raises(DataError, match=r"holds no file that matches include=\['\*\.x'\]"):
        read(tmp_path, format="jsonl", include=["*.x"])
    with pytest.raises(ConfigError, match="the source of domain domain has no path"):
        read("", format="jsonl")


def test_a_file_without_lines_gives_nothing(tmp_path, read):
    (tmp_path / "a.jsonl").touch()
    assert read(tmp_path, format="jsonl").documents == []


@pytest.mark.parametrize("ending", ["jsonl", "gz", "zst"])
def test_memory_is_bounded_by_lines_not_by_files(tmp_path: Path, ending, read):
    rng = random.Random(0)
    data = _lines([" ".join(rng.choices(["window", "buffer", "token", "length"], k=180)) for _ in range(4_000)])
    compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending, bytes)
    (tmp_path / f"a.{ending}").write_bytes(compress(data))
    source = SourceConfig(domain="d", path=str(tmp_path), format="jsonl")
    (unit,) = plan_units(source)
    tracemalloc.start()
    count = sum(1 for _ in read_unit(source, unit))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4_000
    assert len(data) > 4_500_000
    assert peak_bytes < 2_500_000
