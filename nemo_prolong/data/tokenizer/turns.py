"""What a chat template puts around an answer: the token that ends a turn, and where the prompt ends.

Both are found by rendering short conversations, so that nothing depends on the names that a family of models uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer.rendering import REFUSALS
from nemo_prolong.data.tokenizer.template import ChatTemplate
from nemo_prolong.errors import ConfigError

_SAID, _START, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_ESCAPED = f"\\u{ord(_SAID):04x}"
_CALL_ID = "abcdefghi"
"""Some templates want ids of nine letters or digits."""

SYSTEM = {"role": "system", "content": "You are brief."}
QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "It is seven."}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Its name."}},
            "required": ["town"],
        },
    },
}


def calling(mark: str = "") -> list[dict[str, Any]]:
    """Return a question that a tool is called for, up to the answer."""
    function = {"name": f"get_weather{mark}", "arguments": {"town": f"Oslo{mark}"}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": _CALL_ID, "function": function}],
    }
    result = {"role": "tool", "tool_call_id": _CALL_ID, "content": "rain"}
    return [QUESTION, call, result, ANSWER]


def _said() -> dict[str, Any]:
    return {**ANSWER, "content": ANSWER["content"] + _SAID}


@dataclass(frozen=True)
class Turns:
    """What a template puts around answers.

    Attributes:
        end: The tokens that end a turn and are targets, that of a last answer first.
        learns_calls: Whether the calls of tools that it writes are targets with an end; True where it writes none.
        prompt_gap: Characters of white space that an answer begins with and that are before its target.
    """

    end: tuple[str, ...]
    learns_calls: bool
    prompt_gap: int


def find_turns(template: ChatTemplate, special: re.Pattern[str]) -> Turns:
    """Return what ``template`` puts around answers.

    Args:
        template: With ``{% generation %}`` blocks.
        special: Matches the special tokens of the tokenizer.

    Raises:
        ConfigError: If no special token ends an answer, or it is no target: a model would never learn to stop.
    """
    last = [*_tails(template, [QUESTION, _said()]), *_tails(template, [SYSTEM, QUESTION, _said()])]
    earlier = list(_tails(template, [QUESTION, _said(), QUESTION, ANSWER]))
    calls = list(_tails(template, calling(_SAID), tools=[TOOL]))
    ends = [found[0] for tail in last if (found := special.search(tail.learned))]
    if not ends:
        raise _no_end(template, special, last)
    ends += [found[0] for tail in earlier if (found := special.search(tail.learned))]
    call_ends = [_end_of_call(special.findall(tail.learned), ends) for tail in calls]
    ends += [end for end in call_ends if end is not None]
    return Turns(tuple(dict.fromkeys(ends)), None not in call_ends, _prompt_gap(template))


def _end_of_call(tokens: Sequence[str], ends: Sequence[str]) -> str | None:
    """Return the token that ends a turn of calls: tokens may close each call before it."""
    known = [token for token in tokens if token in ends]
    return known[0] if known else tokens[-1] if tokens else None


@dataclass(frozen=True)
class _Tail:
    """What follows on something that the assistant said: first what is a target, then what is not."""

    learned: str
    rest: str


def _tails(template: ChatTemplate, messages: Sequence[dict[str, Any]], **variables: Any) -> Iterator[_Tail]:
    """Yield what follows on what is marked as said; nothing where the template refuses that or does not write it."""
    try:
        text = template.render(Conversation(messages, variables=variables), _START, _END).replace(_ESCAPED, _SAID)
    except REFUSALS:
        return
    before, said, after = text.rpartition(_SAID)
    if not said:
        return
    learned = ""
    if before.count(_START) > before.count(_END):
        learned, _, after = after.partition(_END)
    while after.startswith(_START):
        more, _, after = after[1:].partition(_END)
        learned += more
    yield _Tail(learned, after)


def _no_end(template: ChatTemplate, special: re.Pattern[str], tails: Sequence[_Tail]) -> ConfigError:
    outside = [found[0] for tail in tails if (found := special.search(_unmarked(tail.rest)))]
    if not tails:
        rule = f"does not write what an assistant says{_refusal(template)}."
        remedy = "Set tokenizer.chat_template to a template for messages with role and content."
    elif outside:
        rule = f"ends an answer with {outside[0]} outside of its generation block, so a model never learns to stop."
        remedy = f"Put {outside[0]} before {{% endgeneration %}}."
    else:
        written = _unmarked(tails[0].learned + tails[0].rest)
        rule = f"ends an answer with {written!r:.60}, which is no special token, so a model never learns to stop."
        remedy = (
            "Write a special token such as {{ eos_token }} before {% endgeneration %}. If it is written, add it to the "
            'tokenizer as a special token ("special": true in tokenizer.json).'
        )
    return ConfigError(template.name, rule, remedy)


def _refusal(template: ChatTemplate) -> str:
    try:
        template.render(Conversation([QUESTION, ANSWER]))
    except REFUSALS as error:
        return f", it refuses a question and an answer: {error}"
    return ""


def _unmarked(text: str) -> str:
    return text.replace(_START, "").replace(_END, "")


def _prompt_gap(template: ChatTemplate) -> int:
    """Return how much white space lies between the prompt that a model is given and the first target.

    A token that begins in it is generated by the model.
    """
    gaps = []
    for messages in ([QUESTION, ANSWER], [QUESTION, ANSWER, QUESTION, ANSWER]):
        try:
            prompt = template.render(Conversation(messages[:-1]), prompt=True)
            text = template.render(Conversation(messages), _START, _END)
        except REFUSALS:
            continue
        before = next((b for b in _before_targets(text) if len(b) >= len(prompt)), "")
        gap = before.removeprefix(prompt)
        gaps.append(len(gap) if before.startswith(prompt) and gap.isspace() else 0)
    return min(gaps, default=0)


def _before_targets(text: str) -> Iterator[str]:
    """Yield what is before each target, without marks."""
    for match in re.finditer(_START, text):
        yield _unmarked(text[: match.start()])
