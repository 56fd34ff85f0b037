"""Messages of records in the form that chat templates read: OpenAI's and ShareGPT's, pairs of prompt and completion.

Nothing of a message is left out without a word. What templates commonly read is passed on, weights say what is trained
on, and any other key is refused, or dropped and counted where the user asked for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from nemo_prolong.data.conversation import Message
from nemo_prolong.data.sources.rejection import BadDocument, kind_of, listed, printable
from nemo_prolong.data.sources.strict_json import check_json_value
from nemo_prolong.data.sources.template_values import objects_of, tool_calls_of
from nemo_prolong.data.sources.training_weights import UNCLEAR_KEYS, WEIGHT_KEYS, weight_of

TEXT_KEYS = frozenset(
    {"name", "reasoning", "reasoning_content", "thinking", "tool_call_id", "tool_name", "tool_plan", "metadata"}
)
"""Keys of text that chat templates read beside role and content: reasoning (Qwen, DeepSeek and GLM, gpt-oss and
Granite), what names a tool, Command-R's plan, GLM's metadata."""
OBJECT_KEYS = frozenset({"tools", "functions", "function_calls", "documents"})
"""Keys of objects that some templates read in a message."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "developer",
    "ipython": "ipython",
}
"""Whom ``from`` names, in lower case, to the role of the templates."""
_CALLS = frozenset({"function_call", "tool_call"})
_ASSISTANT = "assistant"
_REMEDY = "Write messages as {role, content} or {from, value}."


class Weighted(NamedTuple):
    """Messages, and for each whether it is to be trained on; None where nothing says so."""

    messages: Sequence[Message]
    weights: Sequence[bool | None]

    @property
    def trained(self) -> tuple[bool, ...] | None:
        """Which messages may be targets, as a conversation has it."""
        if self.weights.count(None) == len(self.weights):
            return None
        return tuple(weight is not False for weight in self.weights)


@dataclass
class MessageReader:
    """Turns messages of records into messages of conversations.

    Attributes:
        drops_unknown: Whether keys that are not known are dropped.
        dropped: Key to the messages that lost it.
    """

    drops_unknown: bool = False
    dropped: Counter[str] = field(default_factory=Counter)

    def read(self, value: Any, name: str) -> Weighted:
        """Return messages, and for each whether it is to be trained on; None where it does not say.

        Args:
            value: What the record holds.
            name: Its field, for messages of errors.

        Raises:
            BadDocument: If it is no list of messages, or something of a message cannot be taken over.
        """
        if not isinstance(value, list):
            rule = f"has {kind_of(value)} in its field {name!r}, not a list of messages."
            raise BadDocument("wrong_type", rule, "Name the field of the messages: messages_field=...")
        if not value:
            raise BadDocument("empty_document", f"has no message in its field {name!r}.", "Remove it.")
        messages, weights = zip(*map(self._message, value, count()), strict=True)
        return Weighted(list(messages), weights)

    def _message(self, message: Any, number: int) -> tuple[Message, bool | None]:
        if type(message) is dict and len(message) == 2:  # the common case, at the speed of the parser
            role, content = message.get("role"), message.get("content")
            if type(role) is str and type(content) is str:
                return {"role": role, "content": content}, None
        if not isinstance(message, Mapping):
            rule = f"has {kind_of(message)} as message {number}, not an object with role and content."
            raise BadDocument("wrong_type", rule, _REMEDY)
        present = {key: value for key, value in message.items() if value is not None}
        what = f"message {number}"
        weight = weight_of(present, what)
        read = _sharegpt(present, what) if "from" in present or "value" in present else present
        taken = self._taken(read, what)
        if weight and taken["role"] != _ASSISTANT:
            rule = f"asks for training on {what}, which is of the role {taken['role']!r}."
            raise BadDocument("bad_weight", rule, "Only what an assistant says is trained on: write 0, or no weight.")
        return taken, weight

    def _taken(self, message: Mapping[str, Any], what: str) -> dict[str, Any]:
        if not isinstance(message.get("role"), str):
            if "role" not in message:
                rule = f"has no 'role' in {what}, only {listed(message)}."
                raise BadDocument("missing_field", rule, _REMEDY)
            rule = f"has {kind_of(message['role'])} as 'role' of {what}, not text."
            raise BadDocument("wrong_type", rule, "Write the role as text.")
        # In one order whatever the file has, because a template may write a message as JSON.
        taken: dict[str, Any] = {"role": message["role"]}
        if "content" in message:
            taken["content"] = _text(message["content"], what)
        for key, value in message.items():
            if key in ("role", "content") or key in WEIGHT_KEYS:
                continue
            read = self._value(key, value, what)
            if read is None:
                continue
            key = "tool_calls" if key == "function_call" else key
            if key in taken:
                rule = f"has both 'function_call' and 'tool_calls' in {what}."
                raise BadDocument("contradiction", rule, "Keep tool_calls, the newer of the two.")
            taken[key] = read
        if "content" not in taken and "tool_calls" not in taken and "function_calls" not in taken:
            rule = f"has no 'content' in {what} and no 'tool_calls', only {listed(message)}."
            raise BadDocument("missing_field", rule, _REMEDY)
        return taken

    def _value(self, key: str, value: Any, what: str) -> Any:
        """Return a value as templates read it; None where the message is to go without it."""
        if key in TEXT_KEYS:
            if not isinstance(value, str):
                rule = f"has {kind_of(value)} as {key!r} of {what}, not text."
                raise BadDocument("wrong_type", rule, f"Write {key} as text.")
            return value
        if key == "tool_calls":
            return tool_calls_of(value, what) or None
        if key == "function_call":
            return tool_calls_of([{"type": "function", "function": value}], what)
        if key in OBJECT_KEYS:
            check_json_value(value, f"{key} of {what}")
            return value or None
        return self._drop(key, value, what)

    def _drop(self, key: str, value: Any, what: str) -> None:
        if key in UNCLEAR_KEYS:
            rule = f"has the key {key!r} in {what}, which asks for a loss on parts of it or is read in several ways."
            raise BadDocument("unknown_key", rule, 'Write "weight": 0 for what is not trained on, or take the key out.')
        if value in ("", [], {}):
            return  # says nothing
        if not self.drops_unknown:
            rule = f"has the key {key!r} in {what}, which would be lost."
            remedy = "Take it out of the messages. Or drop and count such keys: on_unknown_key=drop."
            raise BadDocument("unknown_key", rule, remedy)
        self.dropped[printable(key)] += 1


def said(role: str, text: str) -> Weighted:
    """Return the one message of a text."""
    return Weighted([{"role": role, "content": text}], [None])


def pair(prompt: Weighted, completion: Weighted) -> Weighted:
    """Return a prompt and its completion as one conversation, of which what the assistant says last is trained on.

    Raises:
        BadDocument: If a weight asks for training on a message of the prompt.
    """
    if True in prompt.weights:
        rule = f"asks for training on message {prompt.weights.index(True)} of a prompt."
        raise BadDocument("bad_weight", rule, "Move the message to the completion, or write 0.")
    weights = [weight is not False for weight in completion.weights]
    return Weighted([*prompt.messages, *completion.messages], [False] * len(prompt.messages) + weights)


def with_system(system: Any, read: Weighted) -> Weighted:
    """Return messages begun by the system message that stands beside them in a record.

    Args:
        system: Its text; null and an empty text are none.
        read: The messages.

    Raises:
        BadDocument: If it is no text, or the messages begin with another system message.
    """
    text = "" if system is None else _text(system, "its system message")
    first = read.messages[0]
    if not text or (first["role"] == "system" and first.get("content") == text):
        return read
    if first["role"] == "system":
        rule = "has a system message beside its messages, which begin with another one."
        raise BadDocument("contradiction", rule, "Keep one of them. Or leave the field unread: ignore_fields=[system].")
    before = said("system", text)
    return Weighted([*before.messages, *read.messages], [*before.weights, *read.weights])


def _sharegpt(message: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a message of ``from`` and ``value`` as one of ``role`` and ``content`` or ``tool_calls``."""
    mixed = [key for key in ("role", "content") if key in message]
    if mixed or "from" not in message or "value" not in message:
        rule = f"has {listed(message)} in {what}, which is neither role and content nor from and value."
        raise BadDocument("missing_field" if not mixed else "contradiction", rule, _REMEDY)
    said_by = message["from"]
    role = SHAREGPT_ROLES.get(said_by.lower()) if isinstance(said_by, str) else None
    if role is None:
        rule = f"has from={said_by!r:.40} in {what}, which is none of {', '.join(SHAREGPT_ROLES)}."
        raise BadDocument("wrong_type", rule, "Write such messages as {role, content}.")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if said_by.lower() not in _CALLS:
        return {"role": role, "content": message["value"], **rest}
    calls = message["value"]
    return {"role": role, "tool_calls": [calls] if isinstance(calls, dict) else _calls(calls, what), **rest}


def _calls(value: Any, what: str) -> list[Any]:
    """Return the calls of a ShareGPT message as a list; its text is the JSON of one or of several."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = f"[{value}]"
    return objects_of(value, f"'value' of {what}")


def _text(value: Any, what: str) -> str:
    """Return a content as text: text parts of OpenAI's form, one after the other, as templates that know parts do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadDocument("wrong_type", f"has {kind_of(value)} as 'content' of {what}, not text.", "Write text.")
    return "".join(_text_of_part(part, what) for part in value)


def _text_of_part(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        others = [key for key, value in part.items() if key not in ("type", "text") and value]
        if not others:
            return str(part["text"])
        kind = f"text with {listed(others)}"
    if kind is None:
        rule = f"has a list as 'content' of {what} with {kind_of(part)} in it, not text and no {{type, text}}."
        raise BadDocument("wrong_type", rule, 'Write the content as text, or as parts {"type": "text", "text": ...}.')
    rule = f"has a part of the type {kind!r:.60} in the content of {what}, and only text can be trained on."
    raise BadDocument("wrong_type", rule, "Leave such conversations out.")
