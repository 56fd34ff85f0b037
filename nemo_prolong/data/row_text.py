"""Stored rows as text: their documents, and their tokens decoded in parts that are special, trained on, or plain."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_prolong.data.stored_row import IntArray, StoredRow
from nemo_prolong.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ELLIPSIS = "\u2026"
Boundary = tuple[int, int, int]
"""Start of the document before, the position itself, end of the document after."""


@dataclass(frozen=True)
class Part:
    """Decoded neighbouring tokens of one kind.

    Attributes:
        text: What they say.
        special: One special token; text that only looks like one is no special token.
        target: Whether they are trained on; None where the row has no mask.
    """

    text: str
    special: bool
    target: bool | None


class Decoder:
    """Token ids to parts.

    Args:
        tokenizer: Decodes; None shows the ids themselves.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if tokenizer is not None else {}
        self._special = {number: token.content for number, token in added.items() if token.special}
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True) if tokenizer is not None else None

    def __call__(self, ids: IntArray, mask: IntArray | None = None) -> list[Part]:
        """Decode ``ids`` [N] in runs of one kind; ``mask`` [N] is nonzero on targets."""
        if not len(ids):
            return []
        special = np.isin(ids, list(self._special))
        target = np.zeros(len(ids), bool) if mask is None else np.asarray(mask) != 0
        changes = special[1:] | special[:-1] | (target[1:] != target[:-1])
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
        return [
            Part(
                self._text(ids[a:b].tolist(), bool(special[a]), ids[a - 1 : a].tolist() if goes_on else []),
                bool(special[a]),
                None if mask is None else bool(target[a]),
            )
            for a, b in itertools.pairwise(bounds)
            for goes_on in (a > 0 and not special[a - 1],)
        ]

    def _text(self, ids: list[int], special: bool, before: list[int]) -> str:
        """Return the text of ``ids``, which go on after the token ``before`` or begin a text."""
        if special:
            return str(self._special[ids[0]])
        if self._tokenizer is None:
            return " ".join(map(str, ids)) + " "
        # Decoders of tokenizers that put a space before every text take the first space away.
        known, whole = (str(self._tokenizer.decode(part, skip_special_tokens=False)) for part in (before, before + ids))
        if whole.startswith(known):
            return whole[len(known) :]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load ``tokenizer.json``, given itself or its directory.

    Raises:
        DataError: If there is none.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_buffer(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        rule = f"is no tokenizer: {file.name} cannot be read ({reason})."
        raise DataError(f"tokenizer={path}", rule, "Give a directory that holds a tokenizer.json.") from error


def boundaries_of(row: StoredRow) -> list[Boundary]:
    """Return every boundary of a row, its ends included."""
    starts, ends = row.spans[:, 0].tolist(), row.spans[:, 1].tolist()
    if not starts:
        return []
    return list(zip([starts[0], *starts], [*starts, ends[-1]], [*ends, ends[-1]], strict=True))


def beginning(row: StoredRow, tokens: int, decode: Decoder) -> list[Part]:
    """Return the first ``tokens`` of a row, with an ellipsis where it goes on."""
    parts = decode(row.ids[:tokens], None if row.mask is None else row.mask[:tokens])
    return [*parts, Part(ELLIPSIS, False, False)] if len(row.ids) > tokens else parts


def around(row: StoredRow, boundary: Boundary, context_tokens: int, decode: Decoder) -> tuple[list[Part], list[Part]]:
    """Return what stands before and after a boundary, each from one document, with an ellipsis where it is cut."""
    start, position, end = boundary
    first, last = max(start, position - context_tokens), min(end, position + context_tokens)
    mask = row.mask
    before, after = (
        decode(row.ids[a:b], None if mask is None else mask[a:b]) for a, b in ((first, position), (position, last))
    )
    cut = Part(ELLIPSIS, False, None)
    return [cut, *before] if first > start else before, [*after, cut] if last < end else after
