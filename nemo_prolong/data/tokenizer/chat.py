"""Conversations to token ids with a target mask, by a chat template that marks what an assistant generates.

Text in a message that looks like a special token stays text: a question cannot forge the beginning of an answer. To
tell it from the tokens that the template writes, it is broken by a character before rendering and mended after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Encoding

from nemo_prolong.data.conversation import Conversation, Message
from nemo_prolong.data.tokenizer.encoder import TextEncoder
from nemo_prolong.data.tokenizer.llama3 import BOS, END_HEADER, END_OF_TURN, START_HEADER
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING, ChatTemplate, Marks, choose_marks
from nemo_prolong.errors import ConfigError, DataError

_ROLES = ("system", "user", "assistant")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_PROBES: tuple[Conversation, ...] = tuple(
    Conversation([{"role": role, "content": f"{role} says {n}."} for n, role in enumerate(roles)])
    for roles in (_ROLES[1:], _ROLES, (*_ROLES[1:], *_ROLES[1:]))
)
"""Conversations on which a training template must agree with the tokenizer's own."""


class ChatTokens(NamedTuple):
    """Token ids uint32 [T] of a conversation, and mask uint8 [T]: 1 on targets."""

    input_ids: NDArray[np.uint32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    """Text of a conversation that is encoded apart from the rest.

    Attributes:
        text: A special token of the template, or text between two.
        special: Whether it is a special token.
        spans: Characters (start, end) of it that are targets.
    """

    text: str
    special: bool
    spans: tuple[tuple[int, int], ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of it is a target, or nothing."""
        return not self.spans or self.spans == ((0, len(self.text)),)


class ChatEncoder:
    """Encodes conversations.

    Args:
        encoder: The tokenizer.
        template: A Jinja file with ``{% generation %}`` blocks around what is trained on; None takes Llama-3's format,
            where that is the stripped content of assistant messages and the ``<|eot_id|>`` after it.

    Raises:
        ConfigError: If there is no such file, it marks nothing, the tokenizer has no tokens for Llama-3's format, or
            the text differs from that of the tokenizer's own chat template: the model would be served another format
            than it was trained on.
    """

    def __init__(self, encoder: TextEncoder, template: str | None = None) -> None:
        self._encoder = encoder
        if template is None:
            _check_llama3(encoder)
        name = f"tokenizer.chat_template={template or 'null'}"
        self._template = ChatTemplate(_read(template, name), name, _variables(encoder))
        if not self._template.marks_targets:
            raise ConfigError(
                name,
                "does not mark what is trained on.",
                "Put {% generation %} and {% endgeneration %} around what the assistant says and the token that ends "
                "it.",
            )
        _check_own_template(encoder, self._template)
        special = sorted(encoder.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else re.compile("(?!)")
        self._special_ids = {token: encoder.special_id(token) for token in special}
        # Only then are the parts between special tokens encoded as they are within the whole text.
        self._in_parts = encoder.cutter is not None and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in encoder.definition["added_tokens"]
            if token["special"]
        )

    def encode(self, conversation: Conversation) -> ChatTokens:
        """Encode one conversation; see ``encode_batch``."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[ChatTokens]:
        """Encode conversations.

        Args:
            conversations: Of messages with ``role`` and ``content``.

        Raises:
            DataError: If a message has no known role or no text, there is nothing to learn from, or the template
                refuses it. Also if it holds the text of a special token and this tokenizer could not tell that from the
                token. The conversation is named by its position.
        """
        parts = [self._parts(conversation, number) for number, conversation in enumerate(conversations)]
        encoded = self._encode_parts([part for of_one in parts for part in of_one])
        chats = [_join([next(encoded) for _ in of_one]) for of_one in parts]
        for number, (conversation, chat) in enumerate(zip(conversations, chats, strict=True)):
            if not chat.mask.any():
                raise _without_target(conversation.messages, number)
        return chats

    def _parts(self, conversation: Conversation, number: int) -> list[_Part]:
        messages = conversation.messages
        _check(messages, number)
        marks = choose_marks(conversation, number)
        safe = [{**message, "content": self._break(message["content"], marks)} for message in messages]
        try:
            rendered = self._template.render(replace(conversation, messages=safe), marks.start, marks.end)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"conversation {number}: roles={[message['role'] for message in messages]}",
                f"the chat template refuses it: {error}.",
                "Drop it, or change the template.",
            ) from error
        text, spans = _take_out_marks(rendered, marks)
        if self._in_parts:
            return [_cut_out(text, spans, *piece, marks.broken) for piece in self._pieces(text)]
        if marks.broken in text:
            raise DataError(
                f"conversation {number}",
                f"a message contains the text of a special token of {self._encoder.directory}, which this tokenizer "
                "would take for the token.",
                "Drop the conversation, or remove that text.",
            )
        return [_Part(text, False, tuple(spans))]

    def _break(self, content: str, marks: Marks) -> str:
        return self._special.sub(lambda match: match[0][0] + marks.broken + match[0][1:], content)

    def _pieces(self, text: str) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, special) of the special tokens in ``text`` and of what is between them."""
        place = 0
        for match in self._special.finditer(text):
            if match.start() > place:
                yield place, match.start(), False
            yield match.start(), match.end(), True
            place = match.end()
        if place < len(text):
            yield place, len(text), False

    def _encode_parts(self, parts: Sequence[_Part]) -> Iterator[ChatTokens]:
        """Yield the tokens of each part: as text where its mask is one value, else by the characters of its tokens."""
        divided = [self._divide(part) for part in parts]
        texts = iter(self._encoder.encode_texts([sub.text for part in divided for sub in part if self._is_plain(sub)]))
        others = [sub.text for part in divided for sub in part if not sub.special and not self._is_plain(sub)]
        encodings = iter(self._encoder.encode_with_offsets(others, special=not self._in_parts))
        for part in divided:
            tokens = []
            for sub in part:
                if sub.special:
                    ids = np.array([self._special_ids[sub.text]], np.uint32)
                    tokens.append(ChatTokens(ids, np.full(1, bool(sub.spans), np.uint8)))
                elif self._is_plain(sub):
                    ids = next(texts)
                    tokens.append(ChatTokens(ids, np.full(len(ids), bool(sub.spans), np.uint8)))
                else:
                    tokens.append(_mask_by_characters(next(encodings), sub.spans))
            yield _join(tokens)

    def _is_plain(self, part: _Part) -> bool:
        return self._in_parts and not part.special and part.is_whole

    def _divide(self, part: _Part) -> list[_Part]:
        """Return ``part`` cut where its mask changes if the tokenizer allows that: so no characters must be matched."""
        places = sorted({place for span in part.spans for place in span} - {0, len(part.text)})
        cutter = self._encoder.cutter
        if not self._in_parts or cutter is None or not all(cutter.allows(part.text, place) for place in places):
            return [part]
        edges = [0, *places, len(part.text)]
        return [_cut_out(part.text, part.spans, start, end, part.special) for start, end in pairwise(edges)]


def _read(template: str | None, name: str) -> str:
    path = LLAMA3_TRAINING if template is None else Path(template)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(name, f"the file cannot be read: {error}.", "Give a Jinja file.") from error


def _variables(encoder: TextEncoder) -> dict[str, str]:
    return {name: encoder.named_token(name) or "" for name in _NAMED_TOKENS}


def _check_llama3(encoder: TextEncoder) -> None:
    missing = [t for t in (BOS, START_HEADER, END_HEADER, END_OF_TURN) if t not in encoder.special_tokens]
    if missing:
        raise ConfigError(
            "tokenizer.chat_template=null",
            f"Llama-3's template is built in, and the tokenizer {encoder.directory} has no {', '.join(missing)}.",
            "Set tokenizer.chat_template to a copy of the tokenizer's template with {% generation %} and "
            "{% endgeneration %} around what the assistant says and the token that ends it.",
        )


def _check_own_template(encoder: TextEncoder, template: ChatTemplate) -> None:
    """Refuse to train on another text than the model will be served with."""
    source = _own_template(encoder)
    if source is None:
        return
    own = ChatTemplate(source, f"the chat template of {encoder.directory}", _variables(encoder))
    for probe in _PROBES:
        try:
            expected = own.render(probe)
        except TemplateError:
            continue  # some formats have no system message
        found = _render_or_say_why_not(template, probe)
        if found != expected:
            ours, theirs = _first_difference(found, expected)
            raise ConfigError(
                template.name,
                f"renders another text than the tokenizer's own template: {ours!r} where that has {theirs!r}.",
                "Train on the text that the model is served with: add the marks to a copy of the tokenizer's template.",
            )


def _render_or_say_why_not(template: ChatTemplate, conversation: Conversation) -> str:
    try:
        return template.render(conversation)
    except TemplateError as error:
        return f"an error, {error}"


def _first_difference(text: str, other: str) -> tuple[str, str]:
    """Return what two different texts hold from the first place where they differ."""
    shorter = min(len(text), len(other))
    place = next((n for n in range(shorter) if text[n] != other[n]), shorter)
    return text[place : place + 30], other[place : place + 30]


def _own_template(encoder: TextEncoder) -> str | None:
    path = encoder.directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = encoder.config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _check(messages: Sequence[Message], number: int) -> None:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(
                f"conversation {number}: {dict(message)!r:.80}",
                "a message has a role and a text.",
                "Give role and content as strings.",
            )
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(
            f"conversation {number}: roles={[message['role'] for message in messages]}",
            "has no answer to learn from.",
            "Drop it, or add an assistant message with text.",
        )


def _without_target(messages: Sequence[Message], number: int) -> DataError:
    return DataError(
        f"conversation {number}: roles={[message['role'] for message in messages]}",
        "the template marks nothing of it as a target.",
        "Drop it, or correct the {% generation %} blocks of the template.",
    )


def _take_out_marks(rendered: str, marks: Marks) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without the marks around targets, and the characters (start, end) that they enclosed."""
    parts: list[str] = []
    spans = []
    length = start = 0
    for part in re.split(f"([{marks.start}{marks.end}])", rendered):
        if part == marks.start:
            start = length
        elif part == marks.end:
            spans += [(start, length)] if length > start else []
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans


def _cut_out(
    text: str, spans: Sequence[tuple[int, int]], start: int, end: int, special: bool, broken: str = ""
) -> _Part:
    """Return a part of a text, without the character that breaks what looks like a special token."""

    def place(position: int) -> int:
        within = text[start : min(max(position, start), end)]
        return len(within) - (within.count(broken) if broken else 0)

    clipped = tuple((place(first), place(last)) for first, last in spans if first < end and last > start)
    part = text[start:end]
    return _Part(part.replace(broken, "") if broken else part, special, clipped)


def _mask_by_characters(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> ChatTokens:
    """Return the tokens of a text; one is a target where its first character is."""
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    mask = np.zeros(len(starts), np.uint8)
    for first, last in spans:
        mask[(starts >= first) & (starts < last)] = 1
    return ChatTokens(np.array(encoding.ids, np.uint32), mask)


def _join(parts: Sequence[ChatTokens]) -> ChatTokens:
    return ChatTokens(
        np.concatenate([np.zeros(0, np.uint32), *(part.input_ids for part in parts)]),
        np.concatenate([np.zeros(0, np.uint8), *(part.mask for part in parts)]),
    )
