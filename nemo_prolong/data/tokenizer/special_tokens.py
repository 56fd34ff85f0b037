"""The named special tokens of a tokenizer directory, read as ``transformers`` reads them.

``bos_token`` and its kin may stand in ``tokenizer_config.json`` or in ``special_tokens_map.json``. The second counts
only where the first has no ``added_tokens_decoder``, and then it comes before the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Attributes of every tokenizer of ``transformers`` that name a token."""

ADDITIONAL = "additional_special_tokens"
"""The attribute that lists more of them."""


def named_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Return the special tokens by name, as chat templates of ``transformers`` see them.

    A name without a token is left out, so that ``bos_token is defined`` says whether there is one.

    Args:
        config: Content of ``tokenizer_config.json``.
        special_tokens_map: Content of ``special_tokens_map.json``.
    """
    extra = config.get("extra_special_tokens")
    found = {name: config.get(name) for name in (*NAMED_TOKENS, *(extra if isinstance(extra, dict) else ()))}
    if isinstance(extra, dict):
        found.update(extra)
    additional = list(config.get(ADDITIONAL) or ())
    if "added_tokens_decoder" not in config:
        found.update({name: special_tokens_map[name] for name in NAMED_TOKENS if name in special_tokens_map})
        additional += special_tokens_map.get(ADDITIONAL) or ()
    named: dict[str, str | list[str]] = {name: content for name, token in found.items() if (content := _content(token))}
    contents = [content for token in additional if (content := _content(token))]
    if contents:
        named[ADDITIONAL] = list(dict.fromkeys(contents))
    return named


def _content(token: Any) -> str | None:
    """Return the text of a token, which may be written as a string or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
