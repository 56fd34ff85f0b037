"""The manifest says how conversations were written, and the tokenizer beside the rows serves them so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_prolong.config.rules import check
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.preparation import catalog
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.records.data_manifest import ChatFormat
from tests.support.chat_templates import DATE, GENERATION_TAGS, TOOLS

Prepare = Callable[..., Any]
TALKS = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(20)
]


@pytest.fixture
def prepare_chat(tokenizer_directory: Path, tmp_path: Path) -> Prepare:
    """A function that prepares conversations with the settings of a tokenizer, in ``tmp_path / "data"``."""
    shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "no conversation " * 200}) + "\n")

    def run(field: str | None = "messages", seq_length: int = 128, **tokenizer: Any) -> Any:
        source = {
            "domain": "x",
            "path": str(tmp_path / ("chat.jsonl" if field else "text.jsonl")),
            "messages_field": field,
        }
        cfg = PrepareConfig(
            output=str(tmp_path / "data"),
            sources=[source],
            tokenizer={"path": str(tmp_path / "tokenizer"), **tokenizer},
            row_sets=[{"path": "rows", "domain": "x", "seq_length": seq_length}],
            workers=1,
        )
        check(cfg)
        return prepare(cfg)

    return run


def plain(template: str) -> str:
    for tag in GENERATION_TAGS:
        template = template.replace(tag, "")
    return template


def test_the_manifest_says_how_conversations_are_written(prepare_chat: Prepare) -> None:
    chat = prepare_chat().chat
    assert (chat.template, chat.end_of_turn, chat.date) == (None, ["<|eot_id|>"], None)
    assert len(chat.template_sha256) == 64


def test_text_alone_has_no_chat_format(prepare_chat: Prepare) -> None:
    assert prepare_chat(field=None).chat is None


def test_a_date_is_recorded_and_part_of_the_fingerprint(prepare_chat: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.jinja").write_text(DATE)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(plain(DATE))
    with pytest.raises(ConfigError, match=r"asks for today's date.* Set tokenizer\.chat_date to a date"):
        prepare_chat(chat_template=str(tmp_path / "train.jinja"))
    settings = {"chat_template": str(tmp_path / "train.jinja"), "chat_date": "2024-07-26"}
    manifest = prepare_chat(**settings)
    assert manifest.chat == ChatFormat.model_validate({**manifest.chat.model_dump(), "date": "2024-07-26"})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    row = MdsReader(tmp_path / "data" / "rows")[0]
    assert "Today is 26 July 2024<|eot_id|>" in tokenizer.decode(row["input_ids"])
    assert prepare_chat(**settings).fingerprint == manifest.fingerprint
    with pytest.raises(DataError, match="holds data of another configuration"):
        prepare_chat(**{**settings, "chat_date": "2024-07-27"})


def test_the_tokenizer_gets_a_template_that_writes_more(prepare_chat: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.jinja").write_text(TOOLS)
    prepare_chat(chat_template=str(tmp_path / "train.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert "generation %}" not in tokenizer.chat_template
    tool = {"type": "function", "function": {"name": "get_weather"}}
    texts = [
        tokenizer.apply_chat_template(TALKS[0], [tool], chat_template=template, tokenize=False)
        for template in (None, TOOLS)
    ]
    assert texts[0] == texts[1] and "get_weather" in texts[0]


def test_calls_and_weights_of_a_file_reach_the_rows(prepare_chat: Prepare, tmp_path: Path) -> None:
    (tmp_path / "train.jinja").write_text(TOOLS)
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"town": 7}'}}
    messages = [
        TALKS[0][0],
        {"role": "assistant", "content": "No.", "weight": 0},
        TALKS[1][0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        TALKS[2][1],
    ]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": messages, "tools": [tool]}) + "\n") * 9)
    prepare_chat(chat_template=str(tmp_path / "train.jinja"), seq_length=512)
    row = MdsReader(tmp_path / "data" / "rows")[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    first = slice(*row["indices"][0].tolist())
    targets = tokenizer.decode(row["input_ids"][first][row["mask"][first] == 1])
    assert targets == 'CALL {"name": "get_weather", "arguments": {"town": 7}}<|eot_id|>It is 2.<|eot_id|>'


def test_a_tokenizer_without_a_template_gets_the_one_in_use(prepare_chat: Prepare, tmp_path: Path) -> None:
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    prepare_chat()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    expected = tokenizer.apply_chat_template(TALKS[0], chat_template=LLAMA3_TRAINING.read_text(), tokenize=False)
    assert tokenizer.apply_chat_template(TALKS[0], tokenize=False) == expected


def test_templates_with_names_are_copied_and_decide_the_result(prepare_chat: Prepare, tmp_path: Path) -> None:
    more = tmp_path / "tokenizer" / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("{{ bos_token }}")
    prepare_chat()
    copied = tmp_path / "data" / "tokenizer" / "additional_chat_templates" / "rag.jinja"
    assert copied.read_text() == "{{ bos_token }}"
    (more / "rag.jinja").write_text("{{ eos_token }}")
    with pytest.raises(DataError, match="holds data of another configuration, tokenizer or state"):
        prepare_chat()


def test_conversations_of_an_earlier_version_are_not_reused(
    prepare_chat: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dropped tool calls and weights. What text became did not change, and is reused (tests/compatibility)."""
    with monkeypatch.context() as earlier:
        earlier.setattr(catalog, "_CONVERSATIONS", 1)
        prepare_chat()
    with pytest.raises(DataError, match="or conversations as an earlier version wrote them"):
        prepare_chat()


def test_the_tokenizer_is_checked_before_anything_is_tokenized(prepare_chat: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "NoSuchTokenizer"}))
    with pytest.raises(DataError, match="cannot load it: Tokenizer class NoSuchTokenizer does not exist"):
        prepare_chat()
    assert not (tmp_path / ".data.partial" / "units").exists()
