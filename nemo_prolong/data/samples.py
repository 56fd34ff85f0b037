"""Some rows of a row set as text, for ``samples.json`` and the data card that is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_prolong.data.row_text import Boundary, Decoder, Part, around, beginning, boundaries_of
from nemo_prolong.data.stored_row import StoredRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXT_TOKENS = 32
_BOUNDARIES = 6
_MASKED_TOKENS = 512


def sample_row(row: dict[str, Any], number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return one row of a row set for ``samples.json``.

    Args:
        row: Columns of the row.
        number: Its number in the row set.
        tokenizer: Decodes its tokens.

    Returns:
        ``row``, ``domain``, ``tokens``, ``spans`` [[start, end], ...], ``boundaries`` and ``masked_text``. A boundary
        is ``{"position", "before", "after", "before_special", "after_special"}``: a little text on either side, and
        the character ranges of special tokens in it. The first boundaries are there, and the end of the row.
        ``masked_text`` is the beginning of a row with a mask as ``[{"text", "special", "target"}, ...]``, else None.

    Raises:
        DataError: If the row has a fault (``StoredRow``).
    """
    stored = StoredRow.of(row).checked(f"row {number}")
    decode = Decoder(tokenizer)
    boundaries = boundaries_of(stored)
    if len(boundaries) > _BOUNDARIES:
        boundaries = [*boundaries[: _BOUNDARIES - 1], boundaries[-1]]
    return {
        "row": number,
        "domain": stored.domain,
        "tokens": len(stored.ids),
        "spans": stored.spans.tolist(),
        "boundaries": [_boundary(stored, boundary, decode) for boundary in boundaries],
        "masked_text": None if stored.mask is None else _masked_text(stored, decode),
    }


def _boundary(stored: StoredRow, boundary: Boundary, decode: Decoder) -> dict[str, Any]:
    before, after = around(stored, boundary, _CONTEXT_TOKENS, decode)
    return {
        "position": boundary[1],
        "before": "".join(part.text for part in before),
        "after": "".join(part.text for part in after),
        "before_special": _special_ranges(before),
        "after_special": _special_ranges(after),
    }


def _special_ranges(parts: Sequence[Part]) -> list[list[int]]:
    ends = np.cumsum([len(part.text) for part in parts], dtype=np.int64).tolist()
    return [[end - len(part.text), end] for part, end in zip(parts, ends, strict=True) if part.special]


def _masked_text(stored: StoredRow, decode: Decoder) -> list[dict[str, Any]]:
    parts = beginning(stored, _MASKED_TOKENS, decode)
    return [{"text": part.text, "special": part.special, "target": bool(part.target)} for part in parts]
