"""Tokenizers whose texts are encoded whole: the ids of transformers, and targets by the characters of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer import ChatEncoder, TextEncoder
from nemo_prolong.errors import DataError
from tests.support.chat_tokenizers import (
    LLAMA2_TRAINING,
    LLAMA2_TRAINING_WITHOUT_SPACE,
    llama2_tokenizer,
    metaspace_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

FAMILIES = {
    "llama2": llama2_tokenizer,
    "metaspace": metaspace_tokenizer,
    "unigram": unigram_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}
TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" \n\t\u00a0\u2581aZ7'.[]\u00e9e\u0301\u4e2d\ufb01\uff21\U0001f600", max_size=30),
    st.lists(st.sampled_from(["Paris ", "caf\u00e9", " is", "\n", "[/INST]", "12"]), max_size=6).map("".join),
).filter(lambda text: "<" not in text and "\uff1c" not in text)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatEncoder, str]:
    """The tokenizer of transformers, our encoder of conversations, and the template."""
    root = tmp_path_factory.mktemp(request.param)
    directory = FAMILIES[request.param](root / "tokenizer")
    (root / "train.jinja").write_text(LLAMA2_TRAINING)
    encoder = ChatEncoder(TextEncoder(directory), str(root / "train.jinja"))
    return AutoTokenizer.from_pretrained(directory), encoder, LLAMA2_TRAINING


@settings(max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT.filter(lambda text: text.strip() != "")), min_size=1, max_size=3))
@example([("caf\u00e9 \u4e2d", "\U0001f600 Paris")])
@example([("", "  two spaces"), ("\u2581", "\u00e9")])
@example([("\ufb01 \uff21", "\ufb01\uff21\u2167 Paris")])
@example([("why", "\nParis\n")])
def test_ids_and_mask_are_those_of_transformers(family: Any, turns: list[tuple[str, str]]) -> None:
    tokenizer, encoder, template = family
    messages = []
    for question, answer in turns:
        pair = (("user", question), ("assistant", answer))
        messages += [{"role": role, "content": text.encode("utf-8", "ignore").decode()} for role, text in pair]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encoder.encode(Conversation(messages))
    assert ours.input_ids.tolist() == theirs["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert ours.mask.tolist() == expected_mask(text, offsets, messages)


def expected_mask(text: str, offsets: list[tuple[int, int]], messages: list[dict[str, str]]) -> list[int]:
    """1 where a token begins in an answer, found in the text from its end on."""
    spans, end = [], len(text)
    for message in reversed(messages):
        if message["role"] == "assistant":
            spans.append((end - len(f" {message['content']}</s>"), end))
        else:
            end = spans[-1][0] - len(f"[INST] {message['content']} [/INST]")
    return [int(any(first <= start < last for first, last in spans)) for start, _ in offsets]


WORDS = st.text(alphabet=" \nab\u00e9\u0301\ufb01\uff21\u00df\u0130\u00ad\u200b\u4e2d\U0001f600\u2167[]", max_size=20)
ROLES = ("user", "assistant")
DIGITS = st.text(alphabet="0123\uff14\u00b2\u2463 ", min_size=1, max_size=8).filter(lambda text: text.strip() != "")


@settings(max_examples=150)
@given(st.lists(st.tuples(WORDS, DIGITS), min_size=1, max_size=3))
@example([("\ufb01\ufb01\u0301\ufb01", "1\uff14\u00b2"), ("\u2167\u00ad\U0001f600", "2")])
def test_digits_are_targets_where_answers_alone_have_digits(family: Any, turns: list[tuple[str, str]]) -> None:
    """Normalizers change lengths before an answer and in it. This looks at tokens and at no place in the text."""
    tokenizer, encoder, _ = family
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]
    chat = encoder.encode(Conversation(messages))
    tokens = tokenizer.convert_ids_to_tokens(chat.input_ids.tolist())
    for token, target in zip(tokens, chat.mask.tolist(), strict=True):
        if any(character.isdigit() for character in token) and not token.startswith("<0x"):
            assert target, token
        if any(character in "ab[]INST" for character in token) and token not in ("<unk>", "</s>", "<s>"):
            assert not target or token.startswith("<0x"), token
    ends = chat.mask[chat.input_ids == encoder.encoder.special_id("</s>")]
    assert ends.tolist() == [1] * len(turns)


def test_the_first_word_of_an_answer_is_learned_with_its_space(tmp_path: Path) -> None:
    """The prompt ends before the space, so the model is never given it."""
    encoder = TextEncoder(llama2_tokenizer(tmp_path / "tokenizer"))
    for number, template in enumerate((LLAMA2_TRAINING, LLAMA2_TRAINING_WITHOUT_SPACE)):
        (tmp_path / f"{number}.jinja").write_text(template)
        talk = [{"role": "user", "content": "capital of France"}, {"role": "assistant", "content": "Paris"}]
        chat = ChatEncoder(encoder, str(tmp_path / f"{number}.jinja")).encode(Conversation(talk))
        tokenizer = AutoTokenizer.from_pretrained(encoder.directory)
        targets = tokenizer.convert_ids_to_tokens(chat.input_ids[chat.mask == 1].tolist())
        assert targets == ["\u2581Paris", "</s>"]


def test_a_space_of_the_prompt_is_not_learned(tmp_path: Path) -> None:
    """Where the prompt ends in the space, no model can give the token that begins with it."""
    encoder = TextEncoder(llama2_tokenizer(tmp_path / "tokenizer"))
    template = LLAMA2_TRAINING_WITHOUT_SPACE + "{% if add_generation_prompt %} {% endif %}"
    (tmp_path / "train.jinja").write_text(template)
    talk = [{"role": "user", "content": "capital of France"}, {"role": "assistant", "content": "Paris"}]
    chat = ChatEncoder(encoder, str(tmp_path / "train.jinja")).encode(Conversation(talk))
    assert chat.input_ids[chat.mask == 1].tolist() == [encoder.special_id("</s>")]


@pytest.mark.parametrize("text", ["a </s> b", "</s>"])
def test_text_that_would_become_a_special_token_is_refused(family: Any, text: str) -> None:
    _, encoder, _ = family
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "Paris"}]
    with pytest.raises(DataError, match="conversation 0: a message contains the text of a special token"):
        encoder.encode(Conversation(talk))


def test_what_a_normalizer_makes_a_special_token_is_refused(tmp_path: Path) -> None:
    """NFKC makes full-width marks plain ones, and the vocabulary of Unigram holds the special tokens."""
    (tmp_path / "train.jinja").write_text(LLAMA2_TRAINING)
    encoder = ChatEncoder(TextEncoder(unigram_tokenizer(tmp_path / "tokenizer")), str(tmp_path / "train.jinja"))
    talk = [{"role": "user", "content": "\uff1c/s\uff1e"}, {"role": "assistant", "content": "Paris"}]
    with pytest.raises(DataError, match="conversation 0: a message contains the text of a special token"):
        encoder.encode(Conversation(talk))


def test_a_message_may_end_like_a_special_token_begins(family: Any) -> None:
    tokenizer, encoder, _ = family
    talk = [{"role": "user", "content": "is 1 <"}, {"role": "assistant", "content": "</"}]
    assert encoder.encode(Conversation(talk)).input_ids.tolist() == tokenizer.apply_chat_template(talk)
