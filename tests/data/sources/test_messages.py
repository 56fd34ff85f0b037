"""Messages of records: every meaning that data sets give them is in the conversation, or refused, or counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.data.sources.base import Unread
from nemo_prolong.errors import DataError

ASK = {"role": "user", "content": "What is the weather in Oslo?"}
ANSWER = {"role": "assistant", "content": "It rains."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def write(directory: Path, *records: Any) -> Path:
    file = directory / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def conversation(tmp_path, read):
    """A function from a record to its conversation."""

    def read_one(record: Any, **settings: Any) -> Conversation:
        (document,) = read(
            write(tmp_path, record), **{"format": "jsonl", "messages_field": "messages", **settings}
        ).documents
        return document.conversation

    return read_one


@pytest.fixture
def refusal(tmp_path, read):
    """A function from a record to what is said of it."""

    def refuse(record: Any, **settings: Any) -> DataError:
        with pytest.raises(DataError) as caught:
            read(write(tmp_path, record), **{"format": "jsonl", "messages_field": "messages", **settings})
        assert caught.value.what == f"{tmp_path / 'a.jsonl'}:1"
        return caught.value

    return refuse


def test_what_templates_read_beside_role_and_content_is_passed_on(conversation):
    said = {**ANSWER, "reasoning_content": "It is autumn.", "name": "clerk"}
    tool = {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "get_weather"}
    found = conversation({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, tool, said]})
    assert found.messages == [ASK, {"role": "assistant", "tool_calls": [CALL]}, tool, said]
    assert (found.trained, found.variables) == (None, {})


@pytest.mark.parametrize("arguments", [{"town": "Oslo"}, '{"town": "Oslo"}', ' {"town": "Oslo"}\n'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_arguments_of_tool_calls_are_objects_however_they_came(conversation, arguments, content):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    found = conversation({"messages": [ASK, {"role": "assistant", **content, "tool_calls": [call]}, ANSWER]})
    kept = {key: value for key, value in content.items() if value is not None}
    assert found.messages[1] == {"role": "assistant", **kept, "tool_calls": [{"id": "1", **CALL}]}


@pytest.mark.parametrize(
    "calls",
    [
        [{**CALL, "id": None, "index": None}],
        json.dumps([CALL]),
        [json.dumps(CALL)],
    ],
)
def test_tool_calls_may_be_json_and_null_is_no_key(conversation, calls):
    found = conversation({"messages": [ASK, {"role": "assistant", "tool_calls": calls}, ANSWER]})
    assert found.messages[1]["tool_calls"] == [CALL]


def test_calls_without_the_outer_object_stay_as_they_are(conversation):
    call = {"name": "get_weather", "arguments": ""}
    found = conversation({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]})
    assert found.messages[1]["tool_calls"] == [{"name": "get_weather", "arguments": {}}]


def test_the_older_function_call_becomes_a_tool_call(conversation):
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": null}'}}
    found = conversation({"messages": [ASK, message]})
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    assert found.messages[1] == {"role": "assistant", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"function": {"name": "f", "arguments": "town: Oslo"}}, "has text in the arguments in tool_calls of message 1 "
         "that is no JSON: Expecting value: line 1 column 1 (char 0)."),
        ({"function": {"name": "f", "arguments": '["Oslo"]'}}, "has arguments in tool_calls of message 1 that are no "
         "object, but ['Oslo']."),
        ({"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}, "is no JSON: an object has the key 'a'"),
        ({"function": {"name": "f", "arguments": '{"a": NaN}'}}, "has nan in the arguments in tool_calls of message 1, "
         "which JSON has not."),
        ({"function": {"name": "f", "arguments": '{"\\ud800": 1}'}}, "has half of a surrogate pair, '\\ud800'"),
        ({"function": {"name": "f", "arguments": {"\ud800": 1}}}, "has half of a surrogate pair, '\\ud800'"),
        ({"function": {"arguments": {}}}, "has a call without the name of a function in tool_calls of message 1."),
        ("f()", "has text in tool_calls of message 1 that is no JSON"),
        (7, "has no list of objects in tool_calls of message 1, but [7]."),
    ],
)  # fmt: skip
def test_a_tool_call_that_is_none_is_refused(refusal, call, said):
    assert said in refusal({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}, ANSWER]}).rule


def test_deep_arguments_are_refused_and_not_a_crash(refusal):
    deep = "[" * 900 + "]" * 900
    error = refusal({"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": deep}]}]})
    assert "nests more than 100 objects and lists" in error.rule


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_and_documents_are_variables_of_the_template(conversation, tools):
    documents = [{"title": "a", "text": "b"}]
    record = {"messages": [ASK, ANSWER], "tools": tools, "documents": documents, "id": 3}
    found = conversation({**record, "chat_template_kwargs": {"enable_thinking": False}})
    assert found.variables == {"tools": [TOOL], "documents": documents, "enable_thinking": False}


@pytest.mark.parametrize("empty", [None, [], "", "[]", "null"])
def test_tools_that_are_none_are_no_variable(conversation, empty):
    assert conversation({"messages": [ASK, ANSWER], "tools": empty, "documents": empty}).variables == {}


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"tools": 7}, "has no list of objects in its tools, but 7."),
        ({"tools": [7]}, "has no list of objects in its tools, but [7]."),
        ({"tools": "get_weather()"}, "has text in its tools that is no JSON"),
        ({"tools": [{"a": float("nan")}]}, "has nan in its tools, which JSON has not."),
        ({"documents": "see page 3"}, "has text in its documents that is no JSON"),
        ({"chat_template_kwargs": [1]}, "has no object in its chat_template_kwargs, but [1]."),
        ({"chat_template_kwargs": {"messages": []}}, "sets 'messages' in its chat_template_kwargs, which is given"),
        ({"tools": [TOOL], "chat_template_kwargs": {"tools": []}}, "sets 'tools' in its chat_template_kwargs"),
    ],
)
def test_variables_that_are_none_are_refused(refusal, beside, said):
    assert said in refusal({"messages": [ASK, ANSWER], **beside}).rule


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight", "trainable", "train_on_turn"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (0.0, 1.0), (False, True)])
def test_weights_say_which_messages_are_trained_on(conversation, key, no, yes):
    messages = [{**ASK, key: no}, {**ANSWER, key: no}, ASK, {**ANSWER, key: yes}, ASK, ANSWER]
    found = conversation({"messages": messages})
    assert found.messages == [ASK, ANSWER] * 3
    assert found.trained == (False, False, True, True, True, True)


def test_weights_that_agree_and_null_are_no_contradiction(conversation):
    message = {**ANSWER, "weight": 0, "train": False, "loss": None}
    assert conversation({"messages": [ASK, message, ASK, ANSWER]}).trained == (True, False, True, True)
    assert conversation({"messages": [ASK, {**ANSWER, "weight": None}]}).trained is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**ANSWER, "weight": 0.5}, "has weight=0.5 in message 1, and the loss is a sum over whole tokens."),
        ({**ANSWER, "weight": "0"}, "has weight='0' in message 1, and the loss is a sum over whole tokens."),
        ({**ANSWER, "train": "yes"}, "has train='yes' in message 1, and the loss is a sum over whole tokens."),
        ({**ANSWER, "weight": 1, "train": False}, "has weight=1 and train=False in message 1."),
        ({**ASK, "weight": 1}, "asks for training on message 1, which is of the role 'user'."),
        ({**ANSWER, "loss_mask": 0}, "has the key 'loss_mask' in message 1, which asks for a loss on parts of it"),
        ({**ANSWER, "train_detail": []}, "has the key 'train_detail' in message 1, which asks for a loss on parts"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(refusal, message, said):
    for on_unknown_key in ("refuse", "drop"):
        error = refusal({"messages": [ASK, message, ANSWER]}, on_unknown_key=on_unknown_key)
        assert said in error.rule
        assert error.remedy.endswith("Or leave such documents out: on_bad_document=drop.")


def test_a_weight_beside_the_messages_is_followed_or_refused(conversation, refusal, tmp_path, read):
    assert conversation({"messages": [ASK, ANSWER], "weight": 1.0, "train": True}).trained is None
    assert "has weight=0.5 in its fields" in refusal({"messages": [ASK, ANSWER], "weight": 0.5}).rule
    nothing = {"messages": [ASK, ANSWER], "train": False}
    assert "has a weight of 0 beside its messages, so nothing of it is to be learned." in refusal(nothing).rule
    file = write(tmp_path, nothing, {"messages": [ASK, ANSWER]})
    found = read(file, format="jsonl", messages_field="messages", on_bad_document="drop")
    assert (len(found.documents), [r.reason for r in found.rejected]) == (1, ["bad_weight"])
    assert conversation({"messages": [ASK, ANSWER], "weight": 0.5}, ignore_fields=["weight"]).trained is None


def test_an_unknown_key_is_refused_with_its_message(refusal):
    error = refusal({"messages": [ASK, {**ANSWER, "emotion": "glad"}]})
    assert error.rule == "has the key 'emotion' in message 1, which would be lost."
    assert error.remedy.startswith("Take it out of the messages. Or drop and count such keys: on_unknown_key=drop.")


def test_unknown_keys_that_say_nothing_are_no_fault(conversation):
    message = {**ANSWER, "refusal": None, "audio": None, "annotations": [], "function_call": None, "tool_calls": []}
    assert conversation({"messages": [ASK, message]}).messages == [ASK, ANSWER]


def test_dropped_keys_and_unread_fields_are_counted(tmp_path):
    messages = [{**ASK, "id": 1}, {**ANSWER, "id": 2, "time": 0}]
    records = [{"messages": messages, "prompt_id": "a", "note": None}, {"messages": [ASK, ANSWER], "note": "b"}]
    source = SourceConfig(
        domain="d",
        path=str(write(tmp_path, *records)),
        format="jsonl",
        messages_field="messages",
        on_unknown_key="drop",
    )
    unread = Unread()
    documents = [document for unit in plan_units(source) for document in read_unit(source, unit, None, unread)]
    assert [document.conversation.messages for document in documents] == [[ASK, ANSWER]] * 2
    assert (unread.columns, unread.keys) == ({"prompt_id": 1, "note": 1}, {"id": 2, "time": 1})


def test_contents_of_text_parts_are_joined(conversation):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?", "image_url": None}]
    assert conversation({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"] == (
        "What is this?"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image"}], "has a part of the type 'image' in the content of message 0, and only text can be"),
        ([{"type": "text", "text": "a", "image_url": "b"}], "has a part of the type 'text with image_url'"),
        ([{"type": "text", "value": "a"}], "has a part of the type 'text' in the content of message 0"),
        (["a"], "has a list as 'content' of message 0 with text in it, not text and no {type, text}."),
        ({"a": 1}, "has an object as 'content' of message 0, not text."),
        (7, "has a number as 'content' of message 0, not text."),
    ],
)
def test_contents_that_are_no_text_are_refused(refusal, content, said):
    assert said in refusal({"messages": [{"role": "user", "content": content}, ANSWER]}).rule


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": None}, "has no 'content' in message 0 and no 'tool_calls', only role."),
        ({"role": "assistant"}, "has no 'content' in message 0 and no 'tool_calls', only role."),
        ({"content": "a"}, "has no 'role' in message 0, only content."),
        ({"role": 1, "content": "a"}, "has a number as 'role' of message 0, not text."),
        ({"role": "user", "from": "human", "content": "a"}, "has role, from, content in message 0, which is neither"),
        ({"role": "user", "value": "a"}, "has role, value in message 0, which is neither role and content nor from"),
        ({"from": "human"}, "has from in message 0, which is neither role and content nor from and value."),
        ({"from": "narrator", "value": "a"}, "has from='narrator' in message 0, which is none of human, user, gpt"),
        ({**ANSWER, "reasoning_content": ["a"]}, "has a list as 'reasoning_content' of message 0, not text."),
        ({**ANSWER, "tool_calls": [CALL], "function_call": CALL["function"]}, "has both 'function_call' and"),
    ],
)
def test_messages_of_no_form_or_of_two_are_refused(refusal, message, said):
    assert said in refusal({"messages": [message, ASK]}).rule


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "What is the weather in Oslo?"},
    {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"town": "Oslo"}}'},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "It rains.", "weight": 0},
    {"from": "User", "value": "Again."},
    {"from": "Assistant", "value": "It rains."},
]


def test_conversations_of_sharegpt_are_read(conversation):
    found = conversation({"conversations": SHAREGPT}, messages_field="conversations")
    call = {"name": "get_weather", "arguments": {"town": "Oslo"}}
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        ANSWER,
        {"role": "user", "content": "Again."},
        ANSWER,
    ]
    assert found.trained == (True, True, True, True, False, True, True)


def test_a_system_message_beside_the_messages_begins_them(conversation, refusal):
    record = {"conversations": SHAREGPT[1:2] + SHAREGPT[4:5], "system": "Be brief."}
    found = conversation(record, messages_field="conversations")
    assert found.messages == [{"role": "system", "content": "Be brief."}, ASK, ANSWER]
    assert found.trained == (True, True, False)
    same = {"conversations": SHAREGPT, "system": "Be brief."}
    assert conversation(same, messages_field="conversations").messages[0]["content"] == "Be brief."
    assert len(conversation(same, messages_field="conversations").messages) == len(SHAREGPT)
    for empty in ("", None):
        assert len(conversation({**record, "system": empty}, messages_field="conversations").messages) == 2
    other = refusal({**same, "system": "Be long."}, messages_field="conversations")
    assert other.rule == "has a system message beside its messages, which begin with another one."
    kept = conversation({**same, "system": "Be long."}, messages_field="conversations", ignore_fields=["system"])
    assert kept.messages[0]["content"] == "Be brief."


PAIR = {"messages_field": None, "prompt_field": "prompt", "completion_field": "completion"}


def test_of_a_pair_the_completion_alone_is_trained_on(conversation):
    found = conversation({"prompt": ASK["content"], "completion": ANSWER["content"]}, **PAIR)
    assert (found.messages, found.trained) == ([ASK, ANSWER], (False, True))
    record = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER, ASK, {**ANSWER, "weight": 0}], "tools": [TOOL]}
    found = conversation(record, **PAIR)
    assert found.messages == [ASK, ANSWER] * 3
    assert found.trained == (False, False, False, True, True, False)
    assert found.variables == {"tools": [TOOL]}


def test_a_pair_with_a_side_that_is_none_is_refused(refusal):
    assert "has no text in its field 'completion'." in refusal({"prompt": "a", "completion": ""}, **PAIR).rule
    assert "has null in its field 'prompt'" in refusal({"prompt": None, "completion": "a"}, **PAIR).rule
    assert "has no field 'completion'" in refusal({"prompt": "a"}, **PAIR).rule
    weighted = {"prompt": [ASK, {**ANSWER, "weight": 1}, ASK], "completion": [ANSWER]}
    assert "asks for training on message 1 of a prompt." in refusal(weighted, **PAIR).rule


def test_a_key_twice_in_a_line_is_refused(tmp_path, read):
    for line, key in (('{"text": "a", "text": "b"}', "text"), ('{"text": "a", "meta": {"n": 1, "n": 2}}', "n")):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(DataError) as caught:
            read(tmp_path / "a.jsonl", format="jsonl")
        assert caught.value.rule == f"holds JSON in which an object has the key {key!r} more than once."
        assert read(tmp_path, format="jsonl", on_bad_document="drop").rejected[0].reason == "duplicate_key"


def test_names_of_fields_with_half_characters_can_be_written(tmp_path, read):
    (tmp_path / "a.jsonl").write_text(r'{"\ud800": 1}')
    (rejected,) = read(tmp_path, format="jsonl", on_bad_document="drop").rejected
    assert rejected.detail == r"has no field 'text'; its fields are \ud800."


def test_a_field_within_an_object_is_named_with_a_dot(tmp_path, read, conversation):
    record = {"sample": {"talk": [ASK, ANSWER]}, "a.b": [ANSWER]}
    assert conversation(record, messages_field="sample.talk").messages == [ASK, ANSWER]
    assert conversation(record, messages_field="a.b").messages == [ANSWER]
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    (document,) = read(tmp_path / "a.parquet", format="parquet", messages_field="sample.talk").documents
    assert document.conversation.messages == [ASK, ANSWER]


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ARGUMENTS = st.fixed_dictionaries(
    {}, optional={"town": WORDS, "days": st.integers(0, 9), "in": st.lists(WORDS, max_size=2)}
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": WORDS}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": WORDS},
            optional={
                "weight": st.sampled_from([0, 1]),
                "reasoning_content": WORDS,
                "tool_calls": ARGUMENTS.map(lambda a: [{"id": "1", "function": {"name": "f", "arguments": a}}]),
            },
        ),
    ),
    min_size=1,
    max_size=4,
)
RECORDS = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional={"tools": st.just([TOOL]), "chat_template_kwargs": st.fixed_dictionaries({"date": WORDS})},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORDS, min_size=1, max_size=4))
def test_every_format_gives_the_same_conversations(tmp_path, read, records):
    for old in tmp_path.iterdir():
        old.unlink()
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.zst").write_bytes(zstandard.compress(data))
    # A struct without fields cannot be written as Parquet, and a table has every field in every row.
    rows = [{"messages": [{"tool_calls": [_full_call()]}]}, *records]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()).slice(1), tmp_path / "d.parquet")
    found = [
        [document.conversation for document in read(tmp_path / name, format=kind, messages_field="messages").documents]
        for name, kind in (("a.jsonl", "jsonl"), ("b.gz", "jsonl"), ("c.zst", "jsonl"), ("d.parquet", "parquet"))
    ]
    assert found[1] == found[2] == found[0]
    assert [_without_empty(one) for one in found[3]] == [_without_empty(one) for one in found[0]]
    assert len(found[0]) == len(records)


def _full_call() -> dict[str, Any]:
    return {"id": "1", "function": {"name": "f", "arguments": {"town": "a", "days": 1, "in": ["a"]}}}


def _schema() -> pa.Schema:
    message = {"role": "a", "content": "a", "weight": 1, "reasoning_content": "a", "tool_calls": [_full_call()]}
    tool = {"type": "f", "function": {"name": "f", "parameters": {"type": "object"}}}
    row = {"messages": [message], "tools": [tool], "chat_template_kwargs": {"date": "a"}}
    return pa.Table.from_pylist([row]).schema


def _without_empty(conversation: Conversation) -> Conversation:
    """Return a conversation without the empty object in ``TOOL``, which Parquet cannot hold."""
    text = json.dumps([conversation.messages, conversation.trained, conversation.variables])
    messages, trained, variables = json.loads(text.replace(', "properties": {}', ""))
    return Conversation(messages, trained, variables)
