"""Conversations to token ids with a target mask, in Llama-3's chat format.

The ids are those of the tokenizer's chat template; the template itself cannot say which tokens are targets. Targets are
the content of assistant messages and the ``<|eot_id|>`` that ends it; everything else is context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding

from nemo_prolong.data.tokenizer import BOS, END_HEADER, END_OF_TURN, START_HEADER, TextEncoder
from nemo_prolong.errors import DataError

ROLES = ("system", "user", "assistant")
_AFTER_HEADER = "\n\n"


class ChatTokens(NamedTuple):
    """Token ids uint32 [N] of a conversation, and mask uint8 [N]: 1 on targets."""

    input_ids: np.ndarray
    mask: np.ndarray


def encode_conversations(
    encoder: TextEncoder, conversations: Sequence[Sequence[Mapping[str, str]]]
) -> list[ChatTokens]:
    """Encode conversations.

    Args:
        encoder: Tokenizer with Llama-3's special tokens.
        conversations: Each a list of messages with ``role`` and ``content``; content is stripped, as the template does.

    Raises:
        DataError: If a message has no known role or no text, or a conversation has no assistant message to learn from.
    """
    for number, messages in enumerate(conversations):
        _check(messages, number)
    flat = [message for messages in conversations for message in messages]
    roles = dict(zip(ROLES, encoder.encode_batch(ROLES), strict=True))
    # The line breaks are encoded with the content, as in the whole text of the template.
    contents = encoder.encode_batch([_AFTER_HEADER + message["content"].strip() for message in flat])
    turns = [
        _encode_turn(encoder, message["role"], roles[message["role"]], content)
        for message, content in zip(flat, contents, strict=True)
    ]
    ends = list(accumulate(map(len, conversations), initial=0))
    return [_join(encoder, turns[start:end]) for start, end in pairwise(ends)]


def _encode_turn(encoder: TextEncoder, role: str, role_tokens: Encoding, content: Encoding) -> ChatTokens:
    header = [encoder.special_id(START_HEADER), *role_tokens.ids, encoder.special_id(END_HEADER)]
    ids = [*header, *content.ids, encoder.special_id(END_OF_TURN)]
    mask = np.zeros(len(ids), np.uint8)
    if role == "assistant":
        after_header = sum(start < len(_AFTER_HEADER) for start, _ in content.offsets)
        mask[len(header) + after_header :] = 1
    return ChatTokens(np.array(ids, np.uint32), mask)


def _join(encoder: TextEncoder, turns: Iterable[ChatTokens]) -> ChatTokens:
    bos = ChatTokens(np.array([encoder.special_id(BOS)], np.uint32), np.zeros(1, np.uint8))
    ids, masks = zip(bos, *turns, strict=True)
    return ChatTokens(np.concatenate(ids), np.concatenate(masks))


def _check(messages: Sequence[Mapping[str, str]], number: int) -> None:
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(
                f"conversation {number}: {dict(message)!r:.80}",
                "a message has a role and a text.",
                f"Give role in {', '.join(ROLES)} and content as a string.",
            )
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(
            f"conversation {number}: roles={[message['role'] for message in messages]}",
            "has no answer to learn from.",
            "Drop it, or add an assistant message with text.",
        )
