"""Chat templates whose ``{% generation %}`` blocks say what an assistant generates.

The environment has what ``transformers`` gives to templates. ``strftime_now`` knows one date, which the configuration
fixes, because the same conversation must become the same tokens tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.errors import ConfigError

LLAMA3_TRAINING = Path(__file__).parent / "llama3_training.jinja"


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


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Text of the template.
        name: What it is called in messages.
        variables: What it sees beside the messages: ``bos_token`` and the like.
        today: What it is told when it asks for the date.

    Attributes:
        source: As given.
        name: As given.
        marks_targets: Whether it has a ``{% generation %}`` block.
        reads: Names of the variables that it reads.

    Raises:
        ConfigError: If it is no Jinja.
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, Any], today: date | None = None) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        self.source = source
        self.name = name
        self._today = today
        self._environment = environment
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
        try:
            self._template = environment.from_string(source)
            names = environment.parse(source).find_all(nodes.Name)
        except TemplateError as error:
            rule = f"is no Jinja template: {error}, line {getattr(error, 'lineno', '?')}."
            raise ConfigError(name, rule, "Correct the template.") from error
        self.reads = frozenset(name.name for name in names if name.ctx == "load")
        self.marks_targets = environment.has_generation

    def render(self, conversation: Conversation, start: str = "", end: str = "", prompt: bool = False) -> str:
        """Return the text of a conversation, what is generated between ``start`` and ``end``.

        Args:
            conversation: What to render.
            start: Put before what is generated.
            end: Put after what is generated.
            prompt: End with what the model is given before an answer.

        Raises:
            TemplateError: If the template refuses the conversation.
        """
        self._environment.generation_marks = (start, end)
        variables = {**self._variables, **conversation.variables}
        if prompt:
            variables["add_generation_prompt"] = True
        return self._template.render(messages=conversation.messages, **variables)

    def _strftime_now(self, form: str) -> str:
        if self._today is None:
            raise TemplateError("it asks for today's date, and tokenizer.chat_date is not set")
        return datetime.combine(self._today, time()).strftime(form)
