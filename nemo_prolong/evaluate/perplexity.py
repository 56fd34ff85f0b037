"""Perplexity by position: how well a model predicts a token that stands ``p`` tokens into its document.

A model that cannot use its long context, or that breaks beyond its trained length, shows it here and nowhere in the
mean loss. Every document is scored alone from its first token, whatever it was packed with. The same documents are
scored for every model, so that the numbers of two models differ only by the models.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_prolong.data.stored_row import StoredRow
from nemo_prolong.errors import DataError
from nemo_prolong.evaluate.scorer import Scorer, require_tokens_in_vocabulary
from nemo_prolong.records.evaluation import Bucket

log = logging.getLogger(__name__)


def split_documents(rows: Iterable[Mapping[str, Any]], max_tokens: int, source: str = "rows") -> Iterator[Tensor]:
    """Yield the documents of packed rows in order, as int64 [T] with 2 <= T <= ``max_tokens``.

    Args:
        rows: Columns of each row, as ``StoredRow`` reads them.
        max_tokens: Longer documents are cut here: nothing beyond the last bucket is counted, so none is computed.
        source: The rows' directory, for messages.

    Raises:
        DataError: If a row has a fault that training refuses.
    """
    for number, columns in enumerate(rows):
        row = StoredRow.of(columns).checked(f"{source} row {number}")
        for begin, end in row.spans.tolist():
            if end - begin >= 2:
                ids = row.ids[begin : min(end, begin + max_tokens)]
                yield torch.from_numpy(ids.astype(np.int64))


class PositionBuckets:
    """Sums of token losses by the position of the target in its document, exact to float64.

    Args:
        ends: Ascending exclusive upper ends; bucket ``i`` holds target positions ``ends[i-1] <= p < ends[i]``.
            The first token of a document has no loss, so position 0 is never counted.
    """

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends
        self.loss_sums = np.zeros(len(ends), dtype=np.float64)
        self.token_counts = np.zeros(len(ends), dtype=np.int64)
        self.document_counts = np.zeros(len(ends), dtype=np.int64)

    def add_document(self, losses: Tensor) -> None:
        """Add one document: ``losses`` float32 [T - 1], element ``i`` belonging to target position ``i + 1``."""
        values = losses.to(torch.float64).numpy()
        for bucket, (start, end) in enumerate(self._spans()):
            inside = values[max(start - 1, 0) : end - 1]
            self.loss_sums[bucket] += inside.sum()
            self.token_counts[bucket] += len(inside)
            self.document_counts[bucket] += bool(len(inside))

    def table(self) -> list[Bucket]:
        """Return the buckets in order; loss (nats per token) and perplexity are None where no document reaches."""
        return [self._bucket(index, start, end) for index, (start, end) in enumerate(self._spans())]

    def _spans(self) -> Iterator[tuple[int, int]]:
        return itertools.pairwise([0, *self.ends])

    def _bucket(self, index: int, start: int, end: int) -> Bucket:
        tokens = int(self.token_counts[index])
        loss = float(self.loss_sums[index]) / tokens if tokens else None
        return Bucket(
            start=start,
            end=end,
            documents=int(self.document_counts[index]),
            tokens=tokens,
            loss=loss,
            perplexity=None if loss is None else math.exp(loss),
        )


class Perplexity(NamedTuple):
    """What ``measure_perplexity`` found: how many documents it scored, and the buckets in order."""

    documents: int
    buckets: list[Bucket]


def measure_perplexity(
    scorer: Scorer, rows: Iterable[Mapping[str, Any]], bucket_ends: list[int], max_documents: int, source: str
) -> Perplexity:
    """Score the first ``max_documents`` documents of ``rows``.

    Args:
        scorer: The model.
        rows: Packed rows, held out from training.
        bucket_ends: Ascending exclusive upper ends of the buckets, in tokens.
        max_documents: Documents scored at most.
        source: The rows' directory, for messages.

    Raises:
        DataError: If a row has a fault, there is no document of two tokens, or another tokenizer wrote them.
    """
    buckets = PositionBuckets(bucket_ends)
    documents = 0
    for document in split_documents(rows, bucket_ends[-1], source):
        require_tokens_in_vocabulary(document, scorer, source)
        buckets.add_document(scorer.token_losses(document))
        documents += 1
        log.debug("%s: document %d, %d tokens", scorer.name, documents, len(document))
        if documents == max_documents:
            break
    if documents == 0:
        raise DataError(
            f"rows={source}", "No document has two tokens or more.", "Name a directory of packed validation rows."
        )
    return Perplexity(documents, buckets.table())
