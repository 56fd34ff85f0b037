"""Conversations to token ids with a target mask, by a chat template that marks what an assistant generates.

Text in a message that looks like a special token stays text: a question cannot forge the beginning of an answer. To
tell it from the tokens that the template writes, it is broken by a character before rendering and mended after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer.encoder import TextEncoder
from nemo_prolong.data.tokenizer.llama3 import BOS, END_HEADER, END_OF_TURN, START_HEADER
from nemo_prolong.data.tokenizer.marks import SpecialTokenBreaker
from nemo_prolong.data.tokenizer.rendering import Rendered, Renderer
from nemo_prolong.data.tokenizer.template import LLAMA3_TRAINING, ChatTemplate
from nemo_prolong.data.tokenizer.turns import find_turns
from nemo_prolong.errors import ConfigError, DataError
from nemo_prolong.records.data_manifest import ChatFormat

_DATE_STRING = "%d %b %Y"
"""How Llama-3's templates write the date that they are given as ``date_string``."""


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
        today: The date that a template is told when it asks.

    Attributes:
        template: The compiled template.
        variables: What the template is given beside conversations and special tokens: the date.
        format: What the manifest says about it.

    Raises:
        ConfigError: If there is no such file, it marks nothing or no token that ends a turn, the tokenizer has no
            tokens for Llama-3's format, or the template asks for the date and none is given.
    """

    def __init__(self, encoder: TextEncoder, template: str | None = None, today: date | None = None) -> None:
        self.encoder = encoder
        if template is None:
            _check_llama3(encoder)
        name = f"tokenizer.chat_template={template or 'null'}"
        source = _read(template, name)
        self.template = ChatTemplate(source, name, encoder.named_tokens, today)
        if not self.template.marks_targets:
            raise ConfigError(
                name,
                "does not mark what is trained on.",
                "Put {% generation %} and {% endgeneration %} around what the assistant says and the token that ends "
                "it.",
            )
        _check_date(self.template, today)
        self.variables: dict[str, Any] = {}
        if today is not None and "date_string" in self.template.reads:
            self.variables["date_string"] = today.strftime(_DATE_STRING)
            self.template = ChatTemplate(source, name, {**encoder.named_tokens, **self.variables}, today)
        breaker = SpecialTokenBreaker(encoder.special_tokens)
        self._special = breaker.pattern
        self._turns = find_turns(self.template, self._special)
        self._renderer = Renderer(self.template, breaker)
        self._special_ids = {token: encoder.special_id(token) for token in encoder.special_tokens}
        self.format = ChatFormat(
            template=template,
            template_sha256=hashlib.sha256(source.encode()).hexdigest(),
            end_of_turn=list(self._turns.end),
            end_of_turn_ids=[self._special_ids[token] for token in self._turns.end],
            date=today.isoformat() if today is not None else None,
        )
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
            conversations: Of messages with ``role`` and ``content``, and whatever else the template writes.

        Raises:
            DataError: As ``Renderer.render``. Also if a conversation holds the text of a special token and this
                tokenizer could not tell that from the token. The conversation is named by its position.
        """
        rendered = [self.render(conversation, number) for number, conversation in enumerate(conversations)]
        parts = [self._parts(one, number) for number, one in enumerate(rendered)]
        encoded = self._encode_parts([part for of_one in parts for part in of_one])
        chats = [_join([next(encoded) for _ in of_one]) for of_one in parts]
        for number, (one, chat) in enumerate(zip(rendered, chats, strict=True)):
            if not chat.mask.any():
                raise _without_target(conversations[number], number)
            if not self._in_parts:
                self._check_special(one, chat, number)
        return chats

    def render(self, conversation: Conversation, number: int = 0) -> Rendered:
        """Return the text of one conversation and its targets; ``number`` is what it is called in messages.

        Raises:
            DataError: As ``Renderer.render``.
        """
        if not self._turns.learns_calls and any(message.get("tool_calls") for message in conversation.messages):
            raise DataError(
                f"conversation {number}: tool_calls",
                "the chat template writes calls of tools, and not as a target with the token that ends the turn.",
                "Put {% generation %} and {% endgeneration %} around the calls and the token that ends them.",
            )
        return self._renderer.render(conversation, number)

    def _parts(self, rendered: Rendered, number: int) -> list[_Part]:
        text, spans, broken = rendered.text, rendered.spans, rendered.broken
        if self._in_parts:
            return [_cut_out(text, spans, *piece, broken) for piece in self._pieces(text)]
        whole = _cut_out(text, spans, 0, len(text), False, broken)
        if len(self._special.findall(whole.text)) != len(self._special.findall(text)):
            raise self._taken_for_a_token(number)
        return [whole]

    def _check_special(self, rendered: Rendered, chat: ChatTokens, number: int) -> None:
        """Refuse what became special tokens that the template did not write, by a normalizer for example."""
        written = [self._special_ids[token] for token in self._special.findall(rendered.text)]
        control = set(self._special_ids.values()) - {self.encoder.unknown_id}
        found = [token for token in chat.input_ids.tolist() if token in control]
        if found != [token for token in written if token in control]:
            raise self._taken_for_a_token(number)

    def _taken_for_a_token(self, number: int) -> DataError:
        return DataError(
            f"conversation {number}",
            f"a message contains the text of a special token of {self.encoder.directory}, which this tokenizer would "
            "take for the token.",
            "Drop the conversation, or remove that text.",
        )

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
        texts = iter(self.encoder.encode_texts([sub.text for part in divided for sub in part if self._is_plain(sub)]))
        others = [sub.text for part in divided for sub in part if not sub.special and not self._is_plain(sub)]
        encodings = iter(self.encoder.encode_with_offsets(others, special=not self._in_parts))
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
                    tokens.append(_mask_by_characters(next(encodings), sub, self._turns.prompt_gap))
            yield _join(tokens)

    def _is_plain(self, part: _Part) -> bool:
        return self._in_parts and not part.special and part.is_whole

    def _divide(self, part: _Part) -> list[_Part]:
        """Return ``part`` cut where its mask changes if the tokenizer allows that: so no characters must be matched."""
        places = sorted({place for span in part.spans for place in span} - {0, len(part.text)})
        cutter = self.encoder.cutter
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


def _check_llama3(encoder: TextEncoder) -> None:
    missing = [t for t in (BOS, START_HEADER, END_HEADER, END_OF_TURN) if t not in encoder.special_tokens]
    if missing:
        raise ConfigError(
            "tokenizer.chat_template=null",
            f"Llama-3's template is built in, and the tokenizer {encoder.directory} has no {', '.join(missing)}.",
            "Set tokenizer.chat_template to a copy of the tokenizer's template with {% generation %} and "
            "{% endgeneration %} around what the assistant says and the token that ends it.",
        )


def _check_date(template: ChatTemplate, today: date | None) -> None:
    asks = "strftime_now" in template.reads
    if asks and today is None:
        raise ConfigError(
            template.name,
            "asks for today's date, and the same conversation must give the same tokens tomorrow.",
            "Set tokenizer.chat_date to a date, such as 2024-07-26.",
        )
    if today is not None and not asks and "date_string" not in template.reads:
        raise ConfigError(
            f"tokenizer.chat_date={today}", "the chat template asks for no date.", "Set tokenizer.chat_date=null."
        )


def _without_target(conversation: Conversation, number: int) -> DataError:
    return DataError(
        f"conversation {number}: roles={[message['role'] for message in conversation.messages]}",
        "the template marks nothing of it as a target.",
        "Drop it, or correct the {% generation %} blocks of the template.",
    )


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


def _mask_by_characters(encoding: Encoding, part: _Part, gap: int) -> ChatTokens:
    """Return the tokens of a text; one is a target where its first character is.

    Args:
        encoding: Of the text.
        part: The text and its targets.
        gap: A token that begins at most so many characters before a target and ends in it is one too.
    """
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    mask = np.zeros(len(starts), np.uint8)
    for first, last in part.spans:
        mask[(starts >= first) & (starts < last)] = 1
        mask[(starts >= first - gap) & (starts < first) & (ends > first)] = 1
    return ChatTokens(np.array(encoding.ids, np.uint32), mask)


def _join(parts: Sequence[ChatTokens]) -> ChatTokens:
    return ChatTokens(
        np.concatenate([np.zeros(0, np.uint32), *(part.input_ids for part in parts)]),
        np.concatenate([np.zeros(0, np.uint8), *(part.mask for part in parts)]),
    )
