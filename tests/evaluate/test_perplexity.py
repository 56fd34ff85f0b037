import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.errors import DataError
from nemo_prolong.evaluate.perplexity import PositionBuckets, measure_perplexity, split_documents
from nemo_prolong.evaluate.transformers_scorer import TransformersScorer


@pytest.fixture(scope="module")
def scorer(hf_directory):
    return TransformersScorer(hf_directory)


def test_buckets_of_a_real_model_equal_a_brute_force(scorer, rows):
    result = measure_perplexity(scorer, rows, [8, 32, 64], max_documents=100, source="rows")

    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for row in rows:
        for begin, end in row["indices"].tolist():
            for target in range(1, end - begin):
                prefix = torch.tensor(row["input_ids"][begin : begin + target].astype(np.int64))
                with torch.inference_mode():
                    logits = scorer.model(prefix[None]).logits[0, -1]
                bucket = 0 if target < 8 else 1 if target < 32 else 2
                sums[bucket] -= float(torch.log_softmax(logits, -1)[int(row["input_ids"][begin + target])])
                counts[bucket] += 1

    assert result.documents == 4
    assert [entry.tokens for entry in result.buckets] == counts
    assert [(entry.start, entry.end) for entry in result.buckets] == [(0, 8), (8, 32), (32, 64)]
    for entry, total, count in zip(result.buckets, sums, counts, strict=True):
        assert entry.loss == pytest.approx(total / count, rel=1e-5)
        assert entry.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert [entry.documents for entry in result.buckets] == [4, 4, 3]


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    ends=st.lists(st.integers(1, 50), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_every_target_is_counted_once_in_its_bucket(lengths, ends):
    buckets = PositionBuckets(ends)
    for length in lengths:
        buckets.add_document(torch.arange(1, length, dtype=torch.float32))  # loss = target position
    for entry in buckets.table():
        positions = [p for length in lengths for p in range(1, length) if entry.start <= p < entry.end]
        assert entry.tokens == len(positions)
        assert entry.loss == (pytest.approx(np.mean(positions)) if positions else None)


def test_sums_stay_exact_where_float32_would_lose_tokens():
    buckets = PositionBuckets([2**20])
    buckets.add_document(torch.full((2**20 - 1,), 1.0))
    buckets.add_document(torch.full((2**20 - 1,), 2.0**-24))
    assert buckets.loss_sums[0] == (2**20 - 1) * (1 + 2.0**-24)


def test_documents_are_cut_at_the_last_bucket(rows):
    documents = list(split_documents(rows, max_tokens=30))
    assert [len(document) for document in documents] == [30, 20, 30, 30]
    assert documents[1].tolist() == rows[1]["input_ids"][:20].tolist()
    assert documents[2].tolist() == rows[1]["input_ids"][21:51].tolist()
    assert documents[0].dtype == torch.int64


def test_no_more_than_max_documents_are_scored(scorer, rows):
    result = measure_perplexity(scorer, rows, [64], max_documents=2, source="rows")
    assert result.documents == 2 and result.buckets[0].tokens == 63 + 19


def test_a_bucket_no_document_reaches_is_null_rather_than_zero(scorer, rows):
    result = measure_perplexity(scorer, rows, [64, 128], max_documents=9, source="rows")
    last = result.buckets[1]
    assert (last.tokens, last.documents, last.loss, last.perplexity) == (0, 0, None, None)


def test_rows_of_another_tokenizer_are_refused_by_id(scorer):
    row = {"input_ids": np.array([1, 2, 5000], dtype=np.uint32), "indices": np.array([[0, 3]])}
    with pytest.raises(DataError, match=r"rows=foreign: Token id 5000 is beyond the \d+ tokens of hf:"):
        measure_perplexity(scorer, [row], [64], max_documents=1, source="foreign")


def test_rows_without_a_document_to_score_are_refused(scorer):
    row = {"input_ids": np.zeros(2, dtype=np.uint32), "indices": np.array([[0, 1], [1, 2]])}
    with pytest.raises(DataError, match=r"rows=empty: No document has two tokens"):
        measure_perplexity(scorer, [row], [64], max_documents=1, source="empty")
