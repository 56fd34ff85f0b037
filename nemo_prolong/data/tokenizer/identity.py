"""When two tokenizers are the same: they make the same ids of every text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_DECIDING = ("model", "added_tokens", "normalizer", "pre_tokenizer")


def definition_sha256(definition: Mapping[str, Any]) -> str:
    """Return the hash of all that decides the ids of a text: model, added tokens, normalizer, pre-tokenizer.

    Files that differ in layout or in what is done after encoding have the same.

    Args:
        definition: Content of ``tokenizer.json`` as the ``tokenizers`` library writes it.
    """
    described = json.dumps({part: definition[part] for part in _DECIDING}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
