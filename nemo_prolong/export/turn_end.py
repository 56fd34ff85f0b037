"""Refuse an export whose answers could not end: checked by construction, on what its own chat template writes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nemo_prolong.data.tokenizer.rendering import REFUSALS
from nemo_prolong.data.tokenizer.stop_tokens import end_of_turn
from nemo_prolong.errors import ExportError
from nemo_prolong.export.hf_config import SpecialTokens
from nemo_prolong.export.source import ExportSource
from nemo_prolong.records.data_manifest import ChatFormat

_REMEDY = (
    "Restore the tokenizer that the run was trained with, or prepare its data again and train the last stage on that."
)


def check_turn_end(source: ExportSource, special: SpecialTokens, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the chat template of an exported directory ends an answer with a token that ends generation.

    A model that was trained on no conversations is not checked.

    Args:
        source: What is exported.
        special: What ends generation.
        tokenizer: As transformers loads it from the exported directory.

    Raises:
        ExportError: If there is no template, or generation would not end with a turn.
    """
    chat = source.manifest.chat
    if chat is None:
        return
    what = f"tokenizer={source.tokenizer}"
    _check_recorded(what, chat, tokenizer, source.model.vocab_size)
    text = _written_after_answer(what, tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not set(ids) & set(special.stop_ids):
        raise ExportError(
            what,
            f"its chat template ends an answer with {text!r}, and generation ends at {', '.join(special.stop_tokens)}: "
            "an answer would go on into the next turn.",
            _REMEDY,
        )


def _check_recorded(what: str, chat: ChatFormat, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Check that the tokenizer still has the end of a turn that the conversations were written with."""
    for token, number in zip(chat.end_of_turn, chat.end_of_turn_ids, strict=True):
        if not 0 <= number < vocab_size:
            rule = f"conversations end a turn with {token!r}, token {number}, and the model has {vocab_size} tokens."
            raise ExportError(what, rule, _REMEDY)
        found = tokenizer(token, add_special_tokens=False)["input_ids"]
        if number in tokenizer.added_tokens_decoder and found != [number]:
            rule = f"conversations end a turn with {token!r}, token {number}, and here that is {found}."
            raise ExportError(what, rule, _REMEDY)


def _written_after_answer(what: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        rule = "it has no chat template, so the model would be served without the format that it was trained on."
        raise ExportError(what, rule, _REMEDY)
    try:
        return end_of_turn(lambda messages: str(tokenizer.apply_chat_template(list(messages), tokenize=False)))
    except REFUSALS as error:
        rule = f"its chat template refuses a question and an answer: {error}."
        raise ExportError(what, rule, "Correct the template.") from error
