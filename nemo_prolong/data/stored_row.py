"""One stored row of tokens: which columns it must have, which may be absent, and what is wrong with it.

Training, evaluation, preparation, inspection and verification read rows by this module alone, so that none accepts what
another refuses. ``input_ids`` must be there. Without ``indices`` a row is one document. Without ``mask`` every token is
a target. ``length`` is compared where it is there, and ``domain`` is empty where it is not.

Columns of other libraries that say more of the tokens are followed by the preparation alone. Rows that have them are
refused where they are used as they are, because another text or other targets would be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.errors import DataError

TOKENS = "input_ids"
SPANS = "indices"
_REMEDY = "Write the row again."
_ONLY_PREPARED = (
    *("labels", "loss_mask", "completion_mask", "assistant_masks"),
    *("seq_lengths", "cu_seqlens", "position_ids", "attention_mask"),
)
"""Columns about tokens that the preparation follows (``sources.token_columns``), beside those that all readers know."""

IntArray = NDArray[np.integer[Any]]


class RowFault(NamedTuple):
    """What is wrong with a row.

    Attributes:
        reason: One word for counts, such as ``bad_spans``.
        rule: A sentence about the row.
        remedy: What to do about it.
    """

    reason: str
    rule: str
    remedy: str = _REMEDY


@dataclass(frozen=True)
class StoredRow:
    """The columns of a row as all readers take them.

    Attributes:
        ids: Tokens, integers [S]; empty where the row has none that can be read.
        spans: (start, end) of every document, int64 [D, 2]; where they are wrong, cut to the row as well as can be.
        domain: Empty where the row has none.
        mask: uint8 [S], nonzero on targets, or None.
        faults: What every reader refuses, the worst first.
    """

    ids: IntArray
    spans: NDArray[np.int64]
    domain: str = ""
    mask: NDArray[np.uint8] | None = None
    faults: tuple[RowFault, ...] = ()

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> StoredRow:
        """Read the columns of a row; what is wrong with them is in ``faults``."""
        fault = _tokens_fault(columns)
        if fault is not None:
            return cls(np.zeros(0, np.uint32), np.zeros((0, 2), np.int64), faults=(fault,))
        ids = columns[TOKENS]
        faults: list[RowFault] = []
        if "length" in columns and int(columns["length"]) != len(ids):
            faults.append(RowFault("wrong_length", f"says length={columns['length']} and has {len(ids)} tokens."))
        faults += [_unfollowed(name) for name in _ONLY_PREPARED if name in columns and not _says_nothing(name, columns)]
        spans = _spans(columns.get(SPANS), len(ids), faults)
        mask = _mask(columns.get("mask"), len(ids), faults)
        return cls(ids, spans, str(columns.get("domain", "")), mask, tuple(faults))

    def checked(self, where: str) -> StoredRow:
        """Return the row.

        Args:
            where: What to name in an error: the row set and the number of the row.

        Raises:
            DataError: With the first fault, if there is one.
        """
        for fault in self.faults:
            raise DataError(where, fault.rule, fault.remedy)
        return self

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Document boundaries of a row without faults, int64 [D+1]."""
        return np.append(self.spans[:, 0], len(self.ids))

    @property
    def target_tokens(self) -> int:
        """Tokens with a loss: those that a mask marks, or all, but the first of each document."""
        counts = np.ones(len(self.ids), bool) if self.mask is None else self.mask != 0
        counts[self.spans[self.spans[:, 0] < len(counts), 0]] = False
        return int(np.count_nonzero(counts))


def _tokens_fault(columns: Mapping[str, Any]) -> RowFault | None:
    remedy = "Give tokenized or packed rows (docs/data.md)."
    if TOKENS not in columns:
        rule = f"has no column {TOKENS}; its columns are {', '.join(sorted(columns))}."
        return RowFault("missing_field", rule, remedy)
    ids = columns[TOKENS]
    if not isinstance(ids, np.ndarray):
        return RowFault("wrong_type", f"has {TOKENS} of type {type(ids).__name__}, not integers [tokens].", remedy)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        rule = f"has {TOKENS} of shape {list(ids.shape)} and type {ids.dtype}, not integers [tokens]."
        return RowFault("wrong_type", rule, remedy)
    return None


def _unfollowed(name: str) -> RowFault:
    rule = (
        f"has a column {name}, which says more of its tokens than is followed where packed rows are used as they are."
    )
    return RowFault("unread_column", rule, "Pack the rows again (format=packed_mds), or write them without the column.")


def _says_nothing(name: str, columns: Mapping[str, Any]) -> bool:
    """Return whether a column says what is so without it: an attention mask of ones."""
    return name == "attention_mask" and bool(np.all(np.asarray(columns[name]) == 1))


def _spans(indices: Any, length: int, faults: list[RowFault]) -> NDArray[np.int64]:
    if indices is None:
        return np.array([[0, length]], np.int64)
    spans = np.asarray(indices)
    if spans.ndim != 2 or spans.shape[1] != 2 or not len(spans) or not np.issubdtype(spans.dtype, np.integer):
        rule = f"has spans of shape {list(spans.shape)} and type {spans.dtype}, not integers [documents, 2]."
        faults.append(RowFault("bad_spans", rule))
        return np.array([[0, length]], np.int64)
    spans = spans.astype(np.int64)
    edges = np.append(0, spans[:, 1])
    if not np.array_equal(spans[:, 0], edges[:-1]) or edges[-1] != length or bool(np.any(np.diff(edges) <= 0)):
        faults.append(RowFault("bad_spans", _why_spans_do_not_tile(spans, length)))
    return np.clip(spans, 0, length)


def _why_spans_do_not_tile(spans: NDArray[np.int64], length: int) -> str:
    expected = 0
    for number, (start, stop) in enumerate(spans.tolist()):
        fault = _span_fault(start, stop, expected, length)
        if fault is not None:
            return f"has span {number} from {start} to {stop}, {fault}."
        expected = stop
    return f"has no span for its tokens from {expected} to {length}."


def _span_fault(start: int, stop: int, expected: int, length: int) -> str | None:
    if start >= stop:
        return "which holds no token"
    if stop > length:
        return f"which leaves the row of {length} tokens"
    if start < expected:
        return f"which begins before the end of the one before it, {expected}"
    return f"which leaves tokens from {expected} to {start} to no document" if start > expected else None


def _mask(value: Any, length: int, faults: list[RowFault]) -> NDArray[np.uint8] | None:
    if value is None:
        return None
    mask = np.asarray(value)
    if mask.shape != (length,):
        faults.append(RowFault("bad_mask", f"has a mask of shape {list(mask.shape)} for {length} tokens."))
        return None
    odd = mask[(mask != 0) & (mask != 1)]
    if len(odd):
        # Packers are known that write the ids of BOS and EOS into it.
        faults.append(RowFault("bad_mask", f"has {odd[0]} in its mask, which is of 0 and 1."))
    targets: NDArray[np.uint8] = (mask != 0).astype(np.uint8)
    return targets
