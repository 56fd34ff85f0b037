"""Where a turn of a conversation ends, and which tokens of that end stop generation."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.tokenizer.encoder import END_OF_TEXT, TextEncoder
from nemo_prolong.data.tokenizer.llama3 import END_OF_TURN
from nemo_prolong.data.tokenizer.rendering import REFUSALS
from nemo_prolong.data.tokenizer.saved import CONFIG_FILE, TEMPLATE_FILE, read_object
from nemo_prolong.data.tokenizer.template import ChatTemplate
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import ChatFormat

_ANSWER, _NEXT = "answer 71432", "question 90817"
_PROBE = (
    {"role": "user", "content": "question 38105"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
)
_ANY_DATE = datetime.date(2024, 7, 26)
_REMEDY = (
    "End what the assistant says with one token of the tokenizer, such as its eos_token, inside the {% generation %} "
    "block of tokenizer.chat_template, and prepare the data again."
)

Render = Callable[[Sequence[dict[str, str]]], str]
"""Returns the text of messages as a chat template writes it."""


def end_of_turn(render: Render) -> str:
    """Return what a chat template writes after an answer, up to the next turn.

    Args:
        render: The template. Whatever it raises for a question and an answer is raised.
    """
    alone = render(_PROBE[:2]).rpartition(_ANSWER)[2]
    # Some templates end an answer only where something follows it.
    return alone or render(_PROBE).rpartition(_ANSWER)[2].partition(_NEXT)[0]


def chat_stop_ids(chat: ChatFormat, encoder: TextEncoder) -> list[int]:
    """Return the tokens at which generation ends after training on conversations.

    Args:
        chat: How the conversations were written.
        encoder: Their tokenizer.

    Raises:
        DataError: If nothing of what ends a turn is a token of its own, so that generation could not be stopped there.
    """
    added = _added_tokens(encoder)
    ids = [number for number in chat.end_of_turn_ids if added.get(number) in chat.end_of_turn]
    if not ids:
        raise DataError(
            f"tokenizer.chat_template={chat.template or 'null'}",
            f"ends a turn with {''.join(chat.end_of_turn)!r}, and no token of {encoder.directory} stands for that: "
            "generation could not be stopped there.",
            _REMEDY,
        )
    return ids


def check_own_template(encoder: TextEncoder, chat: ChatFormat, stop_ids: Sequence[int]) -> None:
    """Refuse a tokenizer whose own chat template does not end a turn as the conversations were ended.

    Args:
        encoder: The tokenizer that the model is exported with.
        chat: How the conversations were written.
        stop_ids: The tokens that end a turn in them.

    Raises:
        DataError: If it has no template, or one that refuses a conversation or ends turns otherwise.
    """
    what = f"data.tokenizer={encoder.directory}"
    template = _own_template(encoder)
    if template is None:
        raise DataError(
            what,
            "has no chat template, so the model would be served without the format that it is trained with.",
            f"Prepare the data again, or put the training template into the tokenizer's directory as {TEMPLATE_FILE}.",
        )
    try:
        text = end_of_turn(lambda messages: template.render(Conversation(messages)))
    except REFUSALS as error:
        rule = f"its chat template refuses a question and an answer: {error}."
        raise DataError(what, rule, "Correct the template, and prepare the data again.") from error
    if not set(_ids(encoder, text)) & set(stop_ids):
        raise DataError(
            what,
            f"its chat template ends a turn with {text!r}, and the conversations of the data end with "
            f"{' or '.join(map(repr, chat.end_of_turn))}: the model would not stop.",
            "Prepare the data again with the template that the model is to be served with.",
        )


def older_stop_ids(encoder: TextEncoder) -> list[int]:
    """Return what ends generation of a run whose ``stage.json`` does not say, by the tokenizer it was trained with.

    That is the end of a document, and the token that ends a turn in the tokenizer's own chat template. Where there is
    no such template, or it ends turns with no token, it is Llama-3's end of a turn if the tokenizer has that. Versions
    before this record existed exported Llama-3's tokens.
    """
    added = {token: number for number, token in _added_tokens(encoder).items()}
    names = (END_OF_TEXT, encoder.named_token("eos_token"))
    document = [added[name] for name in names if name is not None and name in added][:1]
    turn = _template_stop_ids(encoder) or [added[name] for name in (END_OF_TURN,) if name in added]
    return list(dict.fromkeys([*document, *turn]))


def _template_stop_ids(encoder: TextEncoder) -> list[int]:
    template = _own_template(encoder)
    if template is None:
        return []
    try:
        text = end_of_turn(lambda messages: template.render(Conversation(messages)))
    except REFUSALS:
        return []
    added = _added_tokens(encoder)
    return [number for number in _ids(encoder, text) if number in added][:1]


def _added_tokens(encoder: TextEncoder) -> dict[int, str]:
    """Return the tokens that are found whole in a text, by id."""
    return {token["id"]: token["content"] for token in encoder.definition["added_tokens"]}


def _ids(encoder: TextEncoder, text: str) -> list[int]:
    ids: list[int] = encoder.encode_with_offsets([text], special=True)[0].ids
    return ids


def _own_template(encoder: TextEncoder) -> ChatTemplate | None:
    """Return the chat template that ``transformers`` reads for a tokenizer. It is told some date if it asks."""
    source = _template_source(encoder.directory)
    if source is None:
        return None
    return ChatTemplate(source, f"the chat template of {encoder.directory}", encoder.named_tokens, _ANY_DATE)


def _template_source(directory: Path) -> str | None:
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text("utf-8")
    template = read_object(directory / CONFIG_FILE).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
