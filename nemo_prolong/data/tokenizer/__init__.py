"""Text and conversations to token ids, with any fast ``transformers`` tokenizer."""

from nemo_prolong.data.tokenizer.chat import ChatEncoder, ChatTokens
from nemo_prolong.data.tokenizer.encoder import TextEncoder
from nemo_prolong.data.tokenizer.llama3 import (
    BOS,
    CHAT_TEMPLATE,
    END_HEADER,
    END_OF_TURN,
    EOS,
    SPECIAL_TOKENS,
    START_HEADER,
    train_tokenizer,
)

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "END_HEADER",
    "END_OF_TURN",
    "EOS",
    "SPECIAL_TOKENS",
    "START_HEADER",
    "ChatEncoder",
    "ChatTokens",
    "TextEncoder",
    "train_tokenizer",
]
