"""Packed rows in the length mix of ProLong: document lengths, micro-batches, and directories on disk.

Stage 1 draws 63% of its tokens from documents of exactly one row of 64K, stage 2 23% from documents of 512K and 40%
from documents of 64K; the other 37% of both are short web documents packed together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.batch import PackedBatch
from nemo_prolong.data.dataset import RowFormat, build_row, collate_rows
from nemo_prolong.data.mds import MdsWriter

LONG_DOCUMENT_TOKENS = 65_536
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}

# A log-normal distribution through the shares of documents longer than 4K and 32K that the paper prints for its short
# data (10.9% and 0.8%); it has 5.2% longer than 8K where the paper has 7.2%.
_LOG_MEAN, _LOG_DEVIATION = 6.14, 1.77


@dataclass(frozen=True)
class RowKind:
    """Rows of one kind.

    Attributes:
        name: What documents they hold.
        share: Their share of the tokens of the stage.
        lengths: Documents of such a row, in tokens.
    """

    name: str
    share: float
    lengths: list[int]


def short_documents(row_tokens: int, seed: int, long_tokens: int = LONG_DOCUMENT_TOKENS) -> list[int]:
    """Return lengths of short documents that fill a row; the last one is cut.

    Args:
        row_tokens: Tokens of the row.
        seed: Of the lengths.
        long_tokens: Tokens of what counts as a long document; all lengths are smaller in proportion.
    """
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    missing = row_tokens
    while missing:
        drawn = 1 + int(rng.lognormal(_LOG_MEAN, _LOG_DEVIATION) * long_tokens / LONG_DOCUMENT_TOKENS)
        lengths.append(min(drawn, long_tokens, missing))
        missing -= lengths[-1]
    return lengths


def prolong_mix(row_tokens: int, long_tokens: int = LONG_DOCUMENT_TOKENS) -> list[RowKind]:
    """Return the kinds of rows of stage 1 where a row is one long document, of stage 2 where it is several.

    Args:
        row_tokens: Tokens of a row, a multiple of ``long_tokens``.
        long_tokens: Tokens of a long document.
    """
    short = RowKind("short documents", 0.37, short_documents(row_tokens, 0, long_tokens))
    whole = [row_tokens]
    if row_tokens == long_tokens:
        return [RowKind("one document", 0.63, whole), short]
    several = [long_tokens] * (row_tokens // long_tokens)
    return [RowKind("one document", 0.23, whole), RowKind("long documents", 0.40, several), short]


def micro_batch(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> PackedBatch:
    """Return the micro-batch of one row of random tokens, as the loader makes it."""
    stored = _stored_row(lengths, vocab_size, np.random.default_rng(seed))
    return collate_rows([build_row(stored, RowFormat(sum(lengths), vocab_size=vocab_size), "the benchmark")])


def write_rows(root: Path, rows: Sequence[Sequence[int]], vocab_size: int) -> MixtureEntry:
    """Write rows of random walks over the vocabulary, which a model can learn, below ``root``; return their entry.

    Args:
        root: Becomes a data root: ``rows/`` and an empty tokenizer.
        rows: Document lengths of each row.
        vocab_size: Ids are smaller.
    """
    rng = np.random.default_rng(0)
    with MdsWriter(root / "rows", COLUMNS) as writer:
        for lengths in rows:
            stored = _stored_row(lengths, vocab_size, rng)
            steps = rng.integers(0, 3, len(stored["input_ids"]))
            stored["input_ids"] = (np.cumsum(steps) % min(vocab_size, 32)).astype(np.uint32)
            writer.write(stored)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps({}))
    return MixtureEntry(path="rows", proportion=1.0)


def _stored_row(lengths: Sequence[int], vocab_size: int, rng: np.random.Generator) -> dict[str, Any]:
    bounds = np.cumsum([0, *lengths])
    return {
        "input_ids": rng.integers(0, vocab_size, bounds[-1]).astype(np.uint32),
        "indices": np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.uint32),
        "domain": "benchmark",
        "length": int(bounds[-1]),
    }
