"""Characters that are put into a conversation before it is rendered, and taken out of its text afterwards.

Unicode reserves the noncharacters U+FDD0 to U+FDEF for such use. A conversation that contains some of them gets others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.errors import DataError

_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Marks(NamedTuple):
    """Characters that a conversation does not contain.

    Attributes:
        start: Before generated text.
        end: After generated text.
        broken: Inside what looks like a special token in a message.
        tag: Around the number of a place.
        zero: A digit of such a number.
        one: A digit of such a number.
    """

    start: str
    end: str
    broken: str
    tag: str
    zero: str
    one: str

    def numbered(self, number: int) -> str:
        """Return a tag of characters that stands for ``number``."""
        return self.tag + f"{number:b}".replace("0", self.zero).replace("1", self.one) + self.tag

    def take_out_numbers(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the text without tags, and each tag as (place in that text, number)."""
        parts: list[str] = []
        found = []
        length = 0
        for index, part in enumerate(re.split(f"{self.tag}([{self.zero}{self.one}]+){self.tag}", text)):
            if index % 2:
                found.append((length, int(part.replace(self.zero, "0").replace(self.one, "1"), 2)))
            else:
                parts.append(part)
                length += len(part)
        return "".join(parts), found


def choose_marks(conversation: Conversation, number: int) -> Marks:
    """Return marks that the conversation does not contain, as characters or as escapes of JSON.

    Raises:
        DataError: If almost all of Unicode's noncharacters occur in it.
    """
    text = "".join(_strings((conversation.messages, conversation.variables)))
    lower = text.lower() if r"\u" in text else ""
    free = (mark for mark in _NONCHARACTERS if mark not in text and _escape(mark) not in lower)
    marks = list(islice(free, len(Marks._fields)))
    if len(marks) < len(Marks._fields):
        rule = "contains nearly all noncharacters from U+FDD0 to U+FDEF, which are reserved for internal use."
        raise DataError(f"conversation {number}", rule, "Remove them.")
    return Marks(*marks)


def unescaped(text: str, marks: Marks) -> str:
    """Return a rendered text with the marks that a template wrote as escapes of JSON (``ensure_ascii``) as characters.

    The conversation holds no such escape, so every one is of a mark.
    """
    if r"\ufd" not in text:
        return text
    return re.sub("|".join(re.escape(_escape(mark)) for mark in marks), lambda found: chr(int(found[0][2:], 16)), text)


def take_out_marks(rendered: str, marks: Marks) -> tuple[str, list[tuple[int, int]]]:
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


class SpecialTokenBreaker:
    """Breaks what looks like a special token in a conversation, so that a question cannot forge an answer.

    What could become one with the text that a template puts after it is broken too.

    Args:
        special_tokens: Contents of the special tokens.
    """

    def __init__(self, special_tokens: Sequence[str]) -> None:
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        beginnings = (token[:end] for token in special_tokens for end in range(1, len(token)))
        # A word is no beginning: roles, types and keys are words that templates compare.
        self._beginnings = frozenset(beginning for beginning in beginnings if not beginning.isalnum())
        self._longest = max(map(len, self._beginnings), default=0)

    def break_conversation(self, conversation: Conversation, broken: str) -> Conversation:
        """Return a conversation with ``broken`` inside every special token that any of its strings has."""

        def change(text: str) -> str:
            return self._break(text, broken)

        messages = [
            {
                key: value if key == "role" and value.isidentifier() else changed_strings(value, change)
                for key, value in message.items()
            }
            for message in conversation.messages
        ]
        variables = {key: changed_strings(value, change) for key, value in conversation.variables.items()}
        return replace(conversation, messages=messages, variables=variables)

    def _break(self, text: str, broken: str) -> str:
        while self.pattern.search(text):  # one token may contain another
            text = self.pattern.sub(lambda match: match[0][0] + broken + match[0][1:], text)
        end = len(text.rstrip())
        if any(text[end - size : end] in self._beginnings for size in range(1, min(self._longest, end) + 1)):
            return text[:end] + broken + text[end:]
        return text


def changed_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return parsed JSON with every string in it changed, keys included that are no plain names."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if key.isidentifier() else change(key): changed_strings(item, change) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [changed_strings(item, change) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """Yield every string of parsed JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value))
        yield from _strings(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"
