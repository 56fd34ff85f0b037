"""Where the parts of a conversation come to lie in its rendered text.

Each part gets a numbered tag inside one of its words. A template that only copies its strings writes the tags with
them. Taken out again, they leave the text as it is without them, or they prove nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_prolong.data.conversation import Conversation, Message
from nemo_prolong.data.tokenizer.marks import Marks, changed_strings

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thought before it answered, by the names that templates have for it."""
MEANT = ("tool_plan", "function_calls", "functions", "tools", "documents")
"""Other keys of a message that say something, where a template knows them."""
_INSIDE_LAST_WORD = re.compile(r".*\w(?=\w)", re.DOTALL)
_FIRST_CHARACTER = re.compile(r"\s*\S")
_VARIABLES = ("tools", "documents")


@dataclass(frozen=True)
class Place:
    """A part of a conversation.

    Attributes:
        key: ``content``, ``tool_calls``, ``arguments``, ``tools``, ``documents`` or one of ``REASONING``.
        message: Position of the message, -1 for what stands beside the messages.
        index: Position among several of its kind.
        required: Whether a text without it has lost something.
    """

    key: str
    message: int = -1
    index: int = 0
    required: bool = True

    def __str__(self) -> str:
        """Return what it is called in messages."""
        return self.key if self.message < 0 else f"the {self.key} of message {self.message}"


class Tags:
    """A conversation with a tag in each of its parts.

    Args:
        conversation: What to tag.
        marks: Characters that it does not contain.
        answers_only: Put none into what an assistant does not say.

    Attributes:
        conversation: With tags.
        places: The parts, in the order of their numbers.
    """

    def __init__(self, conversation: Conversation, marks: Marks, answers_only: bool = False) -> None:
        self._marks = marks
        self.places: list[Place] = []
        messages = [
            message if answers_only and message["role"] != "assistant" else dict(self._message(message, number))
            for number, message in enumerate(conversation.messages)
        ]
        variables = {
            key: self._listed(key, value) if key in _VARIABLES and not answers_only else value
            for key, value in conversation.variables.items()
        }
        self.conversation = replace(conversation, messages=messages, variables=variables)

    def _tagger(self, place: Place) -> Callable[[str], str]:
        tag = self._marks.numbered(len(self.places))
        self.places.append(place)

        def put(text: str) -> str:
            found = _INSIDE_LAST_WORD.match(text) or _FIRST_CHARACTER.match(text)
            end = found.end() if found else len(text)
            return text[:end] + tag + text[end:]

        return put

    def _message(self, message: Message, number: int) -> Iterator[tuple[str, Any]]:
        for key, value in message.items():
            if key == "content" and (value or not message.get("tool_calls")):
                yield key, self._content(value, number)
            elif key == "tool_calls" and value:
                yield key, [self._call(call, number, index) for index, call in enumerate(value)]
            elif key in REASONING and isinstance(value, str) and value.strip():
                yield key, self._tagger(Place(key, number, required=False))(value)
            else:
                yield key, value

    def _content(self, content: Any, number: int) -> Any:
        if isinstance(content, str):
            return self._tagger(Place("content", number, required=bool(content.strip())))(content)
        if isinstance(content, Sequence):
            return [self._part(part, number, index) for index, part in enumerate(content)]
        if isinstance(content, Mapping):
            return changed_strings(content, self._tagger(Place("content", number, required=False)))
        return content

    def _part(self, part: Any, number: int, index: int) -> Any:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            return part
        return {**part, "text": self._tagger(Place("content", number, index, bool(part["text"].strip())))(part["text"])}

    def _call(self, call: Any, number: int, index: int) -> Any:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return call
        tagged = {**function, "name": self._tagger(Place("tool_calls", number, index))(function["name"])}
        if function.get("arguments"):
            put = self._tagger(Place("arguments", number, index))
            tagged["arguments"] = _with_keys(function["arguments"], put)
        return {**call, "function": tagged} if "function" in call else tagged

    def _listed(self, key: str, values: Any) -> Any:
        if not isinstance(values, Sequence):
            return values
        return [self._named(Place(key, index=index), value) for index, value in enumerate(values)]

    def _named(self, place: Place, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        put = self._tagger(place)
        if place.key == "documents":
            return changed_strings(value, put)
        function = value.get("function", value)
        tagged = {**function, "name": put(function["name"])} if isinstance(function.get("name"), str) else function
        return {**value, "function": tagged} if "function" in value else tagged


def _with_keys(value: Any, put: Callable[[str], str]) -> Any:
    """Return arguments with every string changed, their names included: they may hold no other string."""
    if isinstance(value, str):
        return put(value)
    if isinstance(value, Mapping):
        return {put(key): _with_keys(item, put) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_with_keys(item, put) for item in value]
    return value


def without(conversation: Conversation, place: Place) -> Conversation:
    """Return a conversation without one of its parts."""
    if place.message < 0:
        left = _all_but(conversation.variables[place.key], place.index)
        return replace(conversation, variables={**conversation.variables, place.key: left or None})
    messages = [dict(message) for message in conversation.messages]
    message = messages[place.message]
    if place.key == "content":
        content = message["content"]
        message["content"] = "" if isinstance(content, str) else _all_but(content, place.index)
    elif place.key == "tool_calls":
        message["tool_calls"] = _all_but(message["tool_calls"], place.index)
    elif place.key == "arguments":
        calls = list(message["tool_calls"])
        calls[place.index] = _without_arguments(calls[place.index])
        message["tool_calls"] = calls
    else:
        del message[place.key]
    return replace(conversation, messages=messages)


def _without_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": {}}}
    return {**call, "arguments": {}}


def _all_but(values: Sequence[Any], index: int) -> list[Any]:
    return [value for number, value in enumerate(values) if number != index]
