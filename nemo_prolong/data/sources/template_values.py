"""What a chat template sees beside roles and contents: tool calls, tools, documents, in the form of ``transformers``.

Data sets store them as objects, or as JSON in a text, because a column of a table has one type. Templates want objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_prolong.data.sources.rejection import BadDocument
from nemo_prolong.data.sources.strict_json import check_json_value, parse_json_text

TOOLS, DOCUMENTS, TEMPLATE_KWARGS = "tools", "documents", "chat_template_kwargs"
_OURS = frozenset({"messages", "add_generation_prompt", "continue_final_message", "chat_template"})
"""Variables that are no matter of a record."""


def variables_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template sees beside the messages.

    Args:
        record: May have ``tools`` and ``documents``, lists of objects or the JSON of one, and ``chat_template_kwargs``,
            an object of further variables. Null and an empty list are as if they were not there.

    Raises:
        BadDocument: If one of them is something else.
    """
    found = {name: objects_of(record.get(name), f"its {name}") for name in (TOOLS, DOCUMENTS)}
    found = {name: value for name, value in found.items() if value}
    return {**found, **_further(record.get(TEMPLATE_KWARGS), found)}


def _further(value: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    further = parse_json_text(value, f"its {TEMPLATE_KWARGS}") if isinstance(value, str) and value else value
    if not further:
        return {}
    if not isinstance(further, dict):
        rule = f"has no object in its {TEMPLATE_KWARGS}, but {further!r:.40}."
        raise BadDocument("wrong_type", rule, "Write it as an object of variables of the template.")
    check_json_value(further, f"its {TEMPLATE_KWARGS}")
    for name in further:
        if name in _OURS or name in found:
            rule = f"sets {name!r} in its {TEMPLATE_KWARGS}, which is given elsewhere."
            raise BadDocument("contradiction", rule, f"Take {name!r} out of it.")
    return further


def tool_calls_of(value: Any, what: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with arguments that are objects.

    OpenAI writes arguments as the JSON of an object, and templates want the object. Empty arguments are an empty one.

    Args:
        value: A list of calls or the JSON of one, each ``{"function": {"name": ..., "arguments": ...}}``, or the inner
            object alone.
        what: The message.

    Raises:
        BadDocument: If it is something else.
    """
    what = f"tool_calls of {what}"
    return [_tool_call(call, what) for call in objects_of(value, what)]


def _tool_call(call: dict[str, Any], what: str) -> dict[str, Any]:
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        rule = f"has a call without the name of a function in {what}."
        raise BadDocument("missing_field", rule, 'Write calls as {"function": {"name": ..., "arguments": {...}}}.')
    if "arguments" in inner:
        inner = {**inner, "arguments": _arguments(inner["arguments"], what)}
    # Null is a key that is not there: templates ask whether a call has an id.
    inner = {key: value for key, value in inner.items() if value is not None}
    if "function" not in call:
        return inner
    return {key: inner if key == "function" else value for key, value in call.items() if value is not None}


def _arguments(value: Any, what: str) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = parse_json_text(value, f"the arguments in {what}")
        check_json_value(value, f"the arguments in {what}")
    if not isinstance(value, dict):
        rule = f"has arguments in {what} that are no object, but {value!r:.40}."
        raise BadDocument("wrong_type", rule, "Write arguments as an object, or as the JSON of one.")
    return value


def objects_of(value: Any, what: str) -> list[dict[str, Any]]:
    """Return a list of objects.

    Args:
        value: The list, the JSON of it, or a list of the JSON of each; null and an empty text are no object.
        what: What they are, for messages.

    Raises:
        BadDocument: If it is something else.
    """
    if isinstance(value, str) and value:
        value = parse_json_text(value, what)
    if value is None or value == "":
        return []
    if isinstance(value, list):
        value = [parse_json_text(item, what) if isinstance(item, str) else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        rule = f"has no list of objects in {what}, but {value!r:.40}."
        raise BadDocument("wrong_type", rule, "Write a list of objects, or the JSON of one.")
    check_json_value(value, what)
    return value
