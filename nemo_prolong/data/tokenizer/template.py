"""Chat templates whose ``{% generation %}`` blocks say what an assistant generates.

The environment has what ``transformers`` gives to templates, except ``strftime_now``: the same conversation must become
the same tokens tomorrow, so templates fall back to the date that they carry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.errors import ConfigError, DataError

LLAMA3_TRAINING = Path(__file__).parent / "llama3_training.jinja"
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_MARKS_NEEDED = 3


class Marks(NamedTuple):
    """Characters that a conversation does not contain: around generated text, and inside forged special tokens."""

    start: str
    end: str
    broken: str


class _Environment(ImmutableSandboxedEnvironment):
    """What ``_GenerationTag`` keeps in the environment: the marks to set, and whether a template has the tag."""

    generation_marks = ("", "")
    has_generation = False


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``: its body between two marks."""

    environment: _Environment
    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block."""
        line = next(parser.stream).lineno
        self.environment.has_generation = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        start, end = self.environment.generation_marks
        return f"{start}{caller()}{end}"


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Text of the template.
        name: What it is called in messages.
        variables: What it sees beside the messages: ``bos_token`` and the like.

    Attributes:
        name: As given.
        marks_targets: Whether it has a ``{% generation %}`` block.

    Raises:
        ConfigError: If it is no Jinja.
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, Any]) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self.name = name
        self._environment = environment
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            rule = f"is no Jinja template: {error}, line {getattr(error, 'lineno', '?')}."
            raise ConfigError(name, rule, "Correct the template.") from error
        self.marks_targets = environment.has_generation

    def render(self, conversation: Conversation, start: str = "", end: str = "") -> str:
        """Return the text of a conversation, what is generated between ``start`` and ``end``.

        Raises:
            TemplateError: If the template refuses the conversation.
        """
        self._environment.generation_marks = (start, end)
        return self._template.render(messages=conversation.messages, **{**self._variables, **conversation.variables})


def choose_marks(conversation: Conversation, number: int) -> Marks:
    """Return marks that the conversation does not contain.

    Raises:
        DataError: If almost all of Unicode's noncharacters occur in it.
    """
    text = "".join(conversation.texts())
    free = [mark for mark in _NONCHARACTERS if mark not in text][:_MARKS_NEEDED]
    if len(free) < _MARKS_NEEDED:
        rule = "contains nearly all noncharacters from U+FDD0 to U+FDEF, which are reserved for internal use."
        raise DataError(f"conversation {number}", rule, "Remove them.")
    return Marks(*free)
