"""Conversations to text by a chat template: what of it is a target, and that nothing of a conversation is lost.

A template writes the keys that it knows and passes over the others without a word. So a text that lacks a part of its
conversation is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError

from nemo_prolong.data.conversation import Conversation, Message
from nemo_prolong.data.tokenizer.marks import Marks, SpecialTokenBreaker, choose_marks, take_out_marks, unescaped
from nemo_prolong.data.tokenizer.places import MEANT, REASONING, Place, Tags, without
from nemo_prolong.data.tokenizer.template import ChatTemplate
from nemo_prolong.errors import DataError

_Span = tuple[int, int]
_ANSWER = {"role": "assistant", "content": "so."}
_QUESTION = {"role": "user", "content": "why?"}
_NO_ANSWERS = frozenset({"system", "developer", "user", "tool", "ipython", "function"})
TOOL_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Oslo"}}}
_START_OF_THOUGHTS, _END_OF_THOUGHTS = "<think>", "</think>"
"""Templates that know thoughts within a content know these (Qwen 3, DeepSeek-R1)."""

REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What the code of a template raises on a conversation that it was not written for."""


class _Found(NamedTuple):
    """Numbers of the parts of a conversation that are written, in all and in each span."""

    anywhere: set[int]
    in_spans: list[set[int]]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation.

    Attributes:
        text: With ``broken`` inside what looks like a special token in a message.
        spans: Characters (start, end) of it that are targets.
        broken: A character that the conversation does not contain.
    """

    text: str
    spans: Sequence[_Span]
    broken: str


class Renderer:
    """Renders conversations with one template.

    Args:
        template: The template.
        breaker: Of the tokenizer's special tokens.
    """

    def __init__(self, template: ChatTemplate, breaker: SpecialTokenBreaker) -> None:
        self._template = template
        self._breaker = breaker

    def render(self, conversation: Conversation, number: int) -> Rendered:
        """Return the text of a conversation.

        Args:
            conversation: What to render.
            number: What it is called in messages.

        Raises:
            DataError: If a message has no role or no text, there is nothing to learn, the template refuses it or does
                not write all of it, or it cannot be told which text belongs to which message.
        """
        check_conversation(conversation, number)
        marks = choose_marks(conversation, number)
        safe = self._breaker.break_conversation(conversation, marks.broken)
        text, marked = take_out_marks(self._text(safe, marks, number), marks)
        spans: Sequence[_Span] = marked
        self._check_keys(conversation, number)
        self._check_contents(conversation, number)
        divided = _is_divided(conversation)
        if divided or _has_tools(conversation) or not _has_all_contents(safe, text):
            tags = Tags(safe, marks)
            found = self._find(tags, marks, text, spans)
            self._check_written(safe, tags, found, number)
            if divided and found is None:  # some templates compare questions with each other
                tags = Tags(safe, marks, answers_only=True)
                found = self._find(tags, marks, text, spans)
            if divided:
                spans = _trained(conversation, tags, found, spans, number)
        return Rendered(text, spans, marks.broken)

    def _text(self, conversation: Conversation, marks: Marks, number: int) -> str:
        try:
            return unescaped(self._template.render(conversation, marks.start, marks.end), marks)
        except REFUSALS as error:
            raise DataError(
                f"conversation {number}: roles={_roles(conversation)}",
                f"the chat template refuses it: {error}.",
                "Drop it, or change the template.",
            ) from error

    def _find(self, tags: Tags, marks: Marks, text: str, spans: Sequence[_Span]) -> _Found | None:
        """Return which parts are written where; None where the tags change what the template does."""
        rendered = self._try(tags.conversation, marks)
        if rendered is None:
            return None
        tagged, tagged_spans = take_out_marks(rendered, marks)
        plain, numbers = marks.take_out_numbers(tagged)
        inside = [marks.take_out_numbers(tagged[start:end]) for start, end in tagged_spans]
        if plain != text or [len(part) for part, _ in inside] != [end - start for start, end in spans]:
            return None
        return _Found({number for _, number in numbers}, [{number for _, number in found} for _, found in inside])

    def _try(self, conversation: Conversation, marks: Marks | None = None) -> str | None:
        """Return the text of a conversation, or None where the template refuses it."""
        try:
            if marks is None:
                return self._template.render(conversation)
            return unescaped(self._template.render(conversation, marks.start, marks.end), marks)
        except REFUSALS:
            return None

    def _writes(self, conversation: Conversation, place: Place) -> bool:
        """Return whether the text is another one without that part."""
        text, other = self._try(conversation), self._try(without(conversation, place))
        return text is None or text != other

    def _check_written(self, conversation: Conversation, tags: Tags, found: _Found | None, number: int) -> None:
        written = found.anywhere if found is not None else set()
        for place_number, place in enumerate(tags.places):
            if place.required and place_number not in written and not self._writes(conversation, place):
                raise _not_written(str(place), conversation, place, number)

    def _check_keys(self, conversation: Conversation, number: int) -> None:
        for key in REASONING:
            if any(message.get(key) for message in conversation.messages) and key not in self._written_reasoning:
                raise _not_written(key, conversation, Place(key), number)
        self._check_thoughts(conversation, number)
        meant = [(n, key) for n, message in enumerate(conversation.messages) for key in MEANT if message.get(key)]
        for n, key in meant:
            if not self._writes(conversation, Place(key, n)):
                raise _not_written(str(Place(key, n)), conversation, Place(key, n), number)
        for key, value in conversation.variables.items():
            if value not in (None, [], "", {}) and key not in self._template.reads:
                raise _not_written(key, conversation, Place(key), number)

    def _check_thoughts(self, conversation: Conversation, number: int) -> None:
        """Refuse an answer that would be learned without the thoughts before it.

        Many templates leave out what was thought in earlier turns. That is how a model is served, so such a turn may
        stand before an answer. As a target it would teach not to think.
        """
        for n, message in enumerate(conversation.messages):
            if message["role"] in _NO_ANSWERS or not (conversation.trained is None or conversation.trained[n]):
                continue
            keys = [key for key in REASONING if message.get(key) and not self._writes(conversation, Place(key, n))]
            if keys or self._leaves_out_thoughts(conversation, n):
                what = f"the {keys[0]} of message {n}" if keys else f"what message {n} says before {_END_OF_THOUGHTS}"
                raise DataError(
                    f"conversation {number}: roles={_roles(conversation)}",
                    f"the chat template does not write {what}, so its answer would be learned without the thoughts.",
                    "Give that message a weight of 0, make a conversation that ends with it, or take the thoughts out.",
                )

    def _leaves_out_thoughts(self, conversation: Conversation, n: int) -> bool:
        """Return whether thoughts within a content make no difference to the text."""
        content = conversation.messages[n].get("content")
        thoughts, end, answer = content.rpartition(_END_OF_THOUGHTS) if isinstance(content, str) else ("", "", "")
        if not end or not thoughts.removeprefix(_START_OF_THOUGHTS).strip():
            return False
        messages = [*conversation.messages]
        messages[n] = {**messages[n], "content": answer.lstrip()}
        text = self._try(conversation)
        return text is not None and text == self._try(replace(conversation, messages=messages))

    def _check_contents(self, conversation: Conversation, number: int) -> None:
        """Refuse contents that a template would write as Python does: ``None``, or a list with its brackets."""
        messages = conversation.messages
        if any(isinstance(m.get("content"), list) and m["role"] != "tool" for m in messages) and not self._takes_lists:
            raise DataError(
                f"conversation {number}: roles={_roles(conversation)}",
                "a content is a list of parts, which the chat template does not join.",
                "Give each content as one string, or change the template.",
            )
        if any(m.get("content", "") is None for m in messages):
            empty = [{**m, "content": ""} if m.get("content", "") is None else m for m in messages]
            text, other = self._try(conversation), self._try(replace(conversation, messages=empty))
            if text is not None and other is not None and text.count("None") > other.count("None"):
                raise DataError(
                    f"conversation {number}: roles={_roles(conversation)}",
                    "the chat template writes the word None for a content that is null.",
                    'Write {{ message.content or "" }} in the template, or give the content as an empty string.',
                )

    @cached_property
    def _takes_lists(self) -> bool:
        """Whether a list of text parts is written like the text."""
        parts = {**_QUESTION, "content": [{"type": "text", "text": _QUESTION["content"]}]}
        return self._try(Conversation([parts, _ANSWER])) == self._try(Conversation([_QUESTION, _ANSWER]))

    @cached_property
    def _written_reasoning(self) -> frozenset[str]:
        """Keys of reasoning that are written in some position: many templates leave that of earlier turns out."""
        answers = (_ANSWER, {**_ANSWER, "tool_calls": [TOOL_CALL]})
        return frozenset(
            key
            for key in REASONING
            for answer in answers
            if self._writes(Conversation([_QUESTION, {**answer, key: "since"}]), Place(key, 1))
        )


def _roles(conversation: Conversation) -> list[Any]:
    return [message.get("role") for message in conversation.messages]


def check_conversation(conversation: Conversation, number: int) -> None:
    """Refuse what is no conversation, and one without anything to learn.

    Raises:
        DataError: If a message has no role or no content, or there is nothing to learn.
    """
    for message in conversation.messages:
        rule = _fault(message)
        if rule:
            what = f"conversation {number}: {dict(message)!r:.80}"
            raise DataError(what, rule, "Give role and content as strings.")
    answers = [n for n, message in enumerate(conversation.messages) if _is_answer(message)]
    if not answers:
        raise DataError(
            f"conversation {number}: roles={_roles(conversation)}",
            "has no answer to learn from.",
            "Drop it, or add an assistant message with text.",
        )
    if conversation.trained is not None and not any(conversation.trained[n] for n in answers):
        raise DataError(
            f"conversation {number}: roles={_roles(conversation)}",
            "has nothing to learn: none of its answers is to be trained on.",
            "Drop it, or give one of its assistant messages a weight of 1.",
        )
    tools = conversation.variables.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        what = f"conversation {number}: tools={tools!r:.60}"
        raise DataError(what, "tools is a list of JSON schemas.", "Write it as such a list.")


def _fault(message: Message) -> str:
    """Return what is wrong with a message, or nothing."""
    content, calls = message.get("content"), message.get("tool_calls")
    called = calls or message.get("function_calls")
    if calls and not (isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls)):
        return "tool_calls is a list of objects."
    if isinstance(content, list):
        parts = all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content)
        known = parts or message.get("role") == "tool"
    elif isinstance(content, Mapping):
        known = message.get("role") == "tool"
    else:
        known = isinstance(content, str) or (content is None and bool(called))
    return "" if isinstance(message.get("role"), str) and known else "a message has a role and a text."


def _is_answer(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or ())
    return bool(text.strip() or message.get("tool_calls") or message.get("function_calls"))


def _is_divided(conversation: Conversation) -> bool:
    """Return whether some of its answers are to be trained on and some are not."""
    if conversation.trained is None:
        return False
    both = zip(conversation.trained, conversation.messages, strict=True)
    return not all(trained for trained, message in both if message["role"] not in _NO_ANSWERS)


def _has_tools(conversation: Conversation) -> bool:
    calls = any(message.get("tool_calls") for message in conversation.messages)
    return calls or any(conversation.variables.get(key) for key in ("tools", "documents"))


def _has_all_contents(conversation: Conversation, text: str) -> bool:
    """Return whether the contents stand in the text as they are, one after the other; then nothing is lost."""
    place = 0
    for message in conversation.messages:
        content = message.get("content")
        if not isinstance(content, str):
            return False
        place = text.find(content.strip(), place)
        if place < 0:
            return False
        place += len(content.strip())
    return True


def _trained(
    conversation: Conversation, tags: Tags, found: _Found | None, spans: Sequence[_Span], number: int
) -> Sequence[_Span]:
    """Return the spans of the messages that are trained on."""
    trained = conversation.trained
    assert trained is not None
    kinds = [
        {trained[tags.places[n].message] for n in numbers if tags.places[n].message >= 0}
        for numbers in (found.in_spans if found is not None else ())
    ]
    values = _with_neighbours(kinds, spans)
    if not values or None in values:
        raise DataError(
            f"conversation {number}: roles={_roles(conversation)}",
            "some of its answers are not to be trained on, and which part of the text is whose cannot be told.",
            "Put one {% generation %} block around what each message becomes, or drop the conversation.",
        )
    return [span for span, value in zip(spans, values, strict=True) if value]


def _with_neighbours(kinds: Sequence[set[bool]], spans: Sequence[_Span]) -> list[bool | None]:
    """Return for each span whether it is trained on, None where that is not known.

    A span without any string of a message, such as the token that ends a turn, belongs to one that it touches.
    """
    values: list[bool | None] = []
    for n, kind in enumerate(kinds):
        near: set[bool | None] = {*kind}
        if not kind:
            near = {values[-1]} if n and spans[n - 1][1] == spans[n][0] else set()
            near |= kinds[n + 1] if n + 1 < len(kinds) and spans[n][1] == spans[n + 1][0] else set()
        values.append(next(iter(near)) if len(near) == 1 else None)
    return values


def _not_written(what: str, conversation: Conversation, place: Place, number: int) -> DataError:
    role = f" ({conversation.messages[place.message]['role']})" if place.message >= 0 else ""
    return DataError(
        f"conversation {number}: roles={_roles(conversation)}",
        f"the chat template does not write {what}{role}, so it would be lost.",
        f"Set tokenizer.chat_template to a template that writes {place.key}, or leave it out of the conversation.",
    )
