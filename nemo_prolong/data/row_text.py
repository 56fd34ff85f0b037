"""Stored rows as text: their documents, and their tokens decoded in parts that are special, trained on, or plain."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ELLIPSIS = "\u2026"
Boundary = tuple[int, int, int]
"""Start of the document before, the position itself, end of the document after."""
IntArray = NDArray[np.integer[Any]]


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
                self._text(ids[a:b].tolist(), bool(special[a])),
                bool(special[a]),
                None if mask is None else bool(target[a]),
            )
            for a, b in itertools.pairwise(bounds)
        ]

    def _text(self, ids: list[int], special: bool) -> str:
        if special:
            return str(self._special[ids[0]])
        if self._tokenizer is None:
            return " ".join(map(str, ids)) + " "
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


@dataclass(frozen=True)
class StoredRow:
    """One stored row.

    Attributes:
        ids: Tokens [S].
        spans: (start, end) of every document, int64 [D, 2].
        domain: Empty where the row has none.
        mask: Nonzero on targets [S], or None.
        problems: What training would refuse, for a person.
    """

    ids: IntArray
    spans: NDArray[np.int64]
    domain: str
    mask: IntArray | None
    problems: list[str]

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> StoredRow:
        """Read the columns of a row; a row without ``indices`` is one document.

        Raises:
            DataError: If it has no tokens.
        """
        ids = row.get("input_ids")
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(
                where,
                f"has no one-dimensional integer column input_ids; its columns are {', '.join(sorted(row))}.",
                "Give tokenized or packed rows (docs/data.md).",
            )
        problems: list[str] = []
        mask = row.get("mask")
        if mask is not None and np.shape(mask) != ids.shape:
            problems.append(f"mask has shape {np.shape(mask)} for {len(ids):,} tokens")
            mask = None
        return cls(ids, _spans(row.get("indices"), len(ids), problems), str(row.get("domain", "")), mask, problems)

    @property
    def target_tokens(self) -> int:
        """Tokens with a loss: those that a mask marks, or all, but the first of each document."""
        counts = np.ones(len(self.ids), bool) if self.mask is None else np.asarray(self.mask) != 0
        counts[self.spans[self.spans[:, 0] < len(counts), 0]] = False
        return int(np.count_nonzero(counts))

    @property
    def boundaries(self) -> list[Boundary]:
        """(start of the document before, position, end of the document after) of every boundary, row ends included."""
        starts, ends = self.spans[:, 0].tolist(), self.spans[:, 1].tolist()
        if not starts:
            return []
        return list(zip([starts[0], *starts], [*starts, ends[-1]], [*ends, ends[-1]], strict=True))


def _spans(indices: Any, length: int, problems: list[str]) -> NDArray[np.int64]:
    """Return document spans int64 [D, 2] cut to the row; what is wrong with them is said in ``problems``."""
    if indices is None:
        return np.array([[0, length]], np.int64)
    spans = np.asarray(indices)
    if spans.ndim != 2 or spans.shape[1] != 2 or not np.issubdtype(spans.dtype, np.integer):
        problems.append(f"indices has shape {spans.shape}, not [documents, 2]")
        return np.array([[0, length]], np.int64)
    spans = spans.astype(np.int64)
    bounds = np.concatenate([[0], spans[:, 1]])
    if not np.array_equal(spans[:, 0], bounds[:-1]) or bounds[-1] != length or np.any(np.diff(bounds) <= 0):
        problems.append(f"the document spans do not tile the {length:,} tokens of the row")
    return np.clip(spans, 0, length)


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
