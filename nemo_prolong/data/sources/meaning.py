"""Columns whose names say that they change what is learned of a document, for a warning where nobody reads them."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.template_values import DOCUMENTS, TEMPLATE_KWARGS, TOOLS
from nemo_prolong.data.sources.token_columns import ATTENTION_MASK, INPUT_IDS, LABELS, MASKS, PACKED, POSITION_IDS
from nemo_prolong.data.sources.training_weights import UNCLEAR_KEYS, WEIGHT_KEYS

_PREFERENCES = ("chosen", "rejected", "rejected_response", "kto_tag", "label")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PARTS_OF_CONVERSATIONS = (
    "system",
    "system_prompt",
    "instruction",
    "input",
    "functions",
    TOOLS,
    DOCUMENTS,
    TEMPLATE_KWARGS,
)
_TOKENS = (*MASKS, LABELS, ATTENTION_MASK, POSITION_IDS, *PACKED)
_MEANINGFUL = frozenset(
    {
        *_PREFERENCES,
        *_MEDIA,
        *_PARTS_OF_CONVERSATIONS,
        *_TOKENS,
        *WEIGHT_KEYS,
        *UNCLEAR_KEYS,
        "sample_weight",
        "weights",
    }
)
_WHOLE_DOCUMENTS = frozenset({"messages", "conversations", "conversation", "completion", "response", INPUT_IDS})
"""What a source of text may hold beside it, if it is a source of something else."""


def columns_to_check(source: SourceConfig, unread: Iterable[str]) -> list[str]:
    """Return the unread columns that a user should know of; those in ``ignore_fields`` are known."""
    meaningful = _MEANINGFUL if source.holds_conversations else _MEANINGFUL | _WHOLE_DOCUMENTS
    return [name for name in unread if name.lower() in meaningful and name not in source.ignore_fields]
