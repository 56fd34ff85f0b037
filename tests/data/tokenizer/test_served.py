"""What a model is trained on is what those who serve it get from transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer import ChatEncoder, TextEncoder
from nemo_prolong.data.tokenizer.generation_tags import without_generation_tags
from nemo_prolong.data.tokenizer.served import check_served_template
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING
from nemo_prolong.errors import ConfigError, DataError
from tests.support.chat_templates import DATE, GENERATION_TAGS, THINKING, TOOLS
from tests.support.chat_tokenizers import (
    LLAMA2_TRAINING,
    add_special_tokens,
    llama2_tokenizer,
    metaspace_tokenizer,
    unigram_tokenizer,
)

TALK = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
Copy = Callable[..., Path]


@pytest.fixture
def copy(tokenizer_directory: Path, tmp_path: Path) -> Copy:
    """A function that copies the tokenizer, changes keys of its JSON files and writes other files."""

    def make(config: dict[str, Any] | None = None, remove: tuple[str, ...] = (), **files: Any) -> Path:
        directory = tmp_path / "tokenizer"
        shutil.copytree(tokenizer_directory, directory)
        path = directory / "tokenizer_config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
        path.write_text(json.dumps({**kept, **(config or {})}))
        for name, content in files.items():
            file = directory / name.replace("__", ".")
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return directory

    return make


def chat_encoder(directory: Path, template: str | None = None, today: date | None = None) -> ChatEncoder:
    if template is None:
        return ChatEncoder(TextEncoder(directory), None, today)
    path = directory.parent / "train.jinja"
    path.write_text(template)
    return ChatEncoder(TextEncoder(directory), str(path), today)


def unmarked(template: str) -> str:
    for tag in GENERATION_TAGS:
        template = template.replace(tag, "")
    return template


def test_the_built_in_template_is_what_the_miniature_serves(tokenizer_directory: Path) -> None:
    assert check_served_template(chat_encoder(tokenizer_directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("| trim", "| upper"), "renders another text than the tokenizer's own template: 'HAT IS IT"),
        (('"system", ', ""), r"'an error, unknown role system' where that has '<\|begin"),
        (("{%- if add_generation_prompt", "{{ eos_token }}{%- if add_"), r"own template: '<\|end_of_text\|>' where"),
        (
            ("{%- if add_generation_prompt", "{%- if false"),
            r"own template: '' where that has '<\|start_header_id\|>assis",
        ),
    ],
)
def test_a_template_that_renders_another_text_is_refused(copy: Copy, change: tuple[str, str], message: str) -> None:
    chat = chat_encoder(copy(), LLAMA3_TRAINING.read_text().replace(*change))
    with pytest.raises(ConfigError, match=message):
        check_served_template(chat)


def test_special_tokens_may_be_named_in_their_own_file(copy: Copy) -> None:
    directory = copy(
        remove=("bos_token", "eos_token", "added_tokens_decoder"),
        special_tokens_map__json={"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}},
    )
    chat = chat_encoder(directory)
    assert check_served_template(chat)
    assert chat.render(Conversation(TALK)).text.startswith("<|begin_of_text|>")


def test_a_token_that_only_a_class_of_transformers_names_is_asked_for(tmp_path: Path) -> None:
    directory = llama2_tokenizer(tmp_path / "tokenizer")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "bos_token"}))
    with pytest.raises(ConfigError, match=r"where that has '<s>\[INST\] .* Write \"bos_token\": \"<s>\" in .*_config"):
        check_served_template(chat_encoder(directory, LLAMA2_TRAINING))


@pytest.mark.parametrize("make", [llama2_tokenizer, metaspace_tokenizer, unigram_tokenizer])
def test_other_families_have_the_ids_of_transformers(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert check_served_template(chat_encoder(make(tmp_path / "tokenizer"), LLAMA2_TRAINING))


def test_other_ids_than_those_of_transformers_are_refused(copy: Copy) -> None:
    """Where tokenizer_config.json makes a token special, transformers splits texts at it."""
    directory = copy(config={"additional_special_tokens": [" is"]})
    with pytest.raises(
        DataError, match=r"transformers .* makes other ids of a conversation than its tokenizer.json: from"
    ):
        check_served_template(chat_encoder(directory))


def test_a_tokenizer_that_transformers_cannot_load_is_refused(copy: Copy) -> None:
    directory = copy(config={"tokenizer_class": "TokenizersBackend"})
    with pytest.raises(DataError) as refusal:
        check_served_template(chat_encoder(directory))
    assert str(refusal.value).startswith(f"tokenizer={directory}: AutoTokenizer of transformers 4.")
    assert "cannot load it: ValueError: Tokenizer class TokenizersBackend does not exist" in str(refusal.value)


def test_code_beside_a_tokenizer_is_not_run(copy: Copy) -> None:
    directory = copy(
        config={"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        own__py="import pathlib; pathlib.Path(__file__).with_name('ran').touch()",
    )
    with pytest.raises(DataError, match="cannot load it: ValueError"):
        check_served_template(chat_encoder(directory))
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("template", [TOOLS, THINKING])
def test_a_template_that_writes_more_than_the_own_one_is_said(copy: Copy, template: str) -> None:
    directory = copy()
    assert not check_served_template(chat_encoder(directory, template))
    (directory / "chat_template.jinja").write_text(without_generation_tags(template))
    assert check_served_template(chat_encoder(directory, template))


def test_a_tokenizer_without_a_template_is_said(copy: Copy) -> None:
    directory = copy()
    (directory / "chat_template.jinja").unlink()
    assert not check_served_template(chat_encoder(directory, TOOLS))


def test_templates_without_a_default_serve_nothing(copy: Copy) -> None:
    directory = copy(config={"chat_template": [{"name": "rag", "template": unmarked(TOOLS)}]})
    (directory / "chat_template.jinja").unlink()
    assert not check_served_template(chat_encoder(directory, TOOLS))


def test_calls_that_are_served_otherwise_are_refused(copy: Copy) -> None:
    directory = copy(chat_template__jinja=unmarked(TOOLS).replace("CALL ", "TOOL "))
    with pytest.raises(ConfigError, match=r"own template: 'CALL .* where that has 'TOOL "):
        check_served_template(chat_encoder(directory, TOOLS))


@pytest.mark.parametrize("place", ["list", "directory"])
def test_the_template_for_tools_is_found_by_its_name(copy: Copy, place: str) -> None:
    named = unmarked(TOOLS).replace("CALL ", "TOOL ")
    if place == "list":
        entries = [{"name": "default", "template": unmarked(TOOLS)}, {"name": "tool_use", "template": named}]
        directory = copy(config={"chat_template": entries})
        (directory / "chat_template.jinja").unlink()
    else:
        directory = copy(chat_template__jinja=unmarked(TOOLS))
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(named)
    with pytest.raises(ConfigError, match=r"own template: 'CALL .* where that has 'TOOL "):
        check_served_template(chat_encoder(directory, TOOLS))


def test_both_sides_are_told_the_same_date(copy: Copy) -> None:
    directory = copy(chat_template__jinja=unmarked(DATE))
    assert check_served_template(chat_encoder(directory, DATE, date(2023, 3, 5)))
    other = DATE.replace("%d %B", "%B %d")
    with pytest.raises(ConfigError, match=r"another text .* 'March 05 2023.* where that has '05 March 2023"):
        check_served_template(chat_encoder(directory, other, date(2023, 3, 5)))


def test_served_source_renders_the_same_text(copy: Copy) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy())
    for template in (TOOLS, THINKING, LLAMA3_TRAINING.read_text(), LLAMA2_TRAINING):
        source = without_generation_tags(template)
        assert "generation %}" not in source
        texts = [tokenizer.apply_chat_template(TALK, chat_template=t, tokenize=False) for t in (template, source)]
        assert texts[0] == texts[1]


def test_a_special_token_may_take_the_space_after_it(copy: Copy) -> None:
    """Phi's do. Then parts cannot be encoded apart."""
    template = TOOLS.replace("<|eot_id|>", "<|end|>").replace('~ "<|end|>"', '~ "<|end|>\\n"')
    directory = copy(chat_template__jinja=unmarked(template))
    add_special_tokens(directory, "<|end|>", rstrip=True)
    assert check_served_template(chat_encoder(directory, template))
