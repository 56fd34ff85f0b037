"""Few shapes out of many rows: what rows are padded to, and how many kernel graphs the two mixtures need for it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.config.rules.kernel_shapes import kernel_documents, kernel_tokens
from nemo_prolong.ops.context_parallel import DocumentPartition, with_empty_documents
from nemo_prolong.ops.row_shapes import few_documents, few_row_tokens
from tests.support.attention_tools import boundaries

STEPS = 2000
# Shares of the mixtures in conf/data. Documents of short domains: median and spread (sigma of the logarithm) of their
# tokens, wider than the lists that DistCA published for ProLong (median 1914, mean 3052).
SHORT_DOMAINS = {
    "fineweb-edu": (0.10, 650, 1.0),
    "fineweb-2023-50": (0.10, 450, 1.1),
    "stackexchange": (0.04, 350, 0.9),
    "dolmawiki": (0.04, 300, 1.1),
    "tuluv2": (0.03, 400, 1.0),
    "arxiv": (0.03, 12_000, 0.9),
    "openwebmath": (0.03, 900, 1.1),
    "textbooks": (0.03, 1900, 1.0),
}


class Mixture(NamedTuple):
    """One stage: its rows, its layout, and the share of rows that are equal long documents, by their number."""

    row_tokens: int
    rows_per_step: int
    context_parallel_size: int
    tensor_parallel_size: int
    long_rows: dict[int, float]


MIXTURES = {
    "64K": Mixture(65_536, 64, 2, 4, {1: 0.60}),
    "512K": Mixture(524_288, 16, 8, 8, {1: 0.20, 8: 0.40}),
}


def rows_of(mixture: Mixture) -> set[tuple[int, int]]:
    """Return (documents, tokens after padding documents to a multiple of 2 * CP) of the rows of all steps."""
    rng = np.random.default_rng(0)
    rows = STEPS * mixture.rows_per_step
    found = {(documents, mixture.row_tokens) for documents in mixture.long_rows}
    for share, median, sigma in SHORT_DOMAINS.values():
        found |= packed(rng, int(share * rows), median, sigma, mixture)
    return found


def packed(rng: np.random.Generator, rows: int, median: float, sigma: float, mixture: Mixture) -> set[tuple[int, int]]:
    """Return the same of rows in which documents follow each other and are cut at the end of a row."""
    total = rows * mixture.row_tokens
    mean = median * np.exp(sigma**2 / 2)
    lengths = np.exp(rng.standard_normal(int(total / mean * 1.1), np.float32) * sigma + np.log(median))
    ends = np.maximum(lengths, 1).astype(np.int64).cumsum()
    assert ends[-1] > total
    cuts = np.concatenate([ends[ends < total], np.arange(1, rows + 1) * mixture.row_tokens])
    cuts.sort(kind="stable")
    pieces = np.diff(cuts, prepend=0)
    first = np.searchsorted(cuts, np.arange(rows) * mixture.row_tokens, side="right")
    unit = 2 * mixture.context_parallel_size
    tokens = np.add.reduceat(-(-pieces // unit) * unit, first)
    documents = np.diff(first, append=len(cuts)) - (np.add.reduceat(pieces == 0, first))
    return set(zip(documents.tolist(), tokens.tolist(), strict=True))


def keys(rows: set[tuple[int, int]], mixture: Mixture) -> set[tuple[int, int]]:
    """Return what kernels of attention are built for: document slots, and tokens on a rank."""
    return {(kernel_documents(d), kernel_tokens(tokens // mixture.context_parallel_size)) for d, tokens in rows}


def test_both_mixtures_need_few_kernels():
    before, after, lengths = set(), set(), set()
    for name, mixture in MIXTURES.items():
        multiple = 2 * mixture.context_parallel_size * mixture.tensor_parallel_size
        rows = rows_of(mixture)
        plain = {(documents, -(-tokens // multiple) * multiple) for documents, tokens in rows}
        padded = {(few_documents(d), few_row_tokens(tokens, mixture.row_tokens, multiple)) for d, tokens in rows}
        before |= {(name, *key) for key in keys(plain, mixture)}
        after |= {(name, *key) for key in keys(padded, mixture)}
        lengths |= {(name, tokens) for _, tokens in padded}
        assert mixture.row_tokens in {tokens for _, tokens in padded}
    print(f"kernels: {len(before)} before, {len(after)} with empty documents; {len(lengths)} lengths of rows")
    assert len(before) > 500
    assert len(after) <= 16, sorted(after)
    assert len(lengths) <= 24, sorted(lengths)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=70).filter(any),
    size=st.sampled_from([2, 4]),
    row_tokens=st.integers(1, 3000),
)
def test_a_partition_of_few_shapes_holds_the_same_tokens(lengths, size, row_tokens):
    unit = 2 * size
    few = [DocumentPartition.of_row(boundaries(lengths), size, r, row_tokens=row_tokens) for r in range(size)]
    plain = [DocumentPartition.of_row(boundaries(lengths), size, r) for r in range(size)]
    needed = sum(-(-length // unit) * unit for length in lengths)
    assert few[0].row_length == few_row_tokens(needed, row_tokens, unit)
    extra = few[0].row_length > needed
    assert len(few[0].cu_seqlens) == few_documents(len(lengths) + extra) + 1
    row = torch.arange(1, sum(lengths) + 1)
    for new, old in zip(few, plain, strict=True):
        assert new.split(row)[: old.shard_length].tolist() == old.split(row).tolist()
        assert not new.split(row)[old.shard_length :].any()
        positions = new.split_positions(torch.zeros_like(row))
        assert positions.max() < new.max_seqlen


def test_a_row_that_fits_has_exactly_the_tokens_of_its_stage():
    assert few_row_tokens(65_000, 65_536, 16) == few_row_tokens(65_536, 65_536, 16) == 65_536
    assert few_row_tokens(65_537, 65_536, 16) == few_row_tokens(65_792, 65_536, 16) == 65_536 + 256
    assert few_row_tokens(65_793, 65_536, 16) == 65_536 + 512
    # The multiple counts: a step of a short row may be shorter than it, and a row no multiple of it.
    assert few_row_tokens(10, 100, 16) == 112 and few_row_tokens(113, 100, 16) == 128
    # Steps are a 256th of the row, and at least a token.
    assert few_row_tokens(5000, 5000, 16) == 5008 and few_row_tokens(5009, 5000, 16) == 5024
    assert few_row_tokens(11, 10, 1) == 11 and few_row_tokens(65_537, 65_536, 1) == 65_536 + 256


def test_what_follows_the_last_document_is_left_out():
    partition = DocumentPartition.of_row(boundaries([3, 2]), 2, 0, row_tokens=16)
    other = DocumentPartition.of_row(boundaries([3, 2]), 2, 1, row_tokens=16)
    row = torch.tensor([[1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9]])
    assert partition.row_length == 16
    assert sorted(part for shard in (partition, other) for part in shard.split(row).flatten().tolist() if part) == [
        *range(1, 6)
    ]


@pytest.mark.parametrize(
    ("documents", "described"),
    [(1, 32), (32, 32), (33, 64), (512, 512), (513, 1024), (8192, 8192), (8193, 8193), (12_287, 12_287)],
)
def test_documents_are_described_by_a_power_of_two_while_kernels_take_it(documents, described):
    assert few_documents(documents) == described
    # Of 4 bytes each in 48 KiB of shared memory, with one boundary more than documents.
    assert 4 * (described + 1) <= 48 * 1024


def test_empty_documents_come_last_and_keep_the_dtype():
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32).numpy()
    described = with_empty_documents(bounds)
    assert described.dtype == np.int32
    assert described.tolist() == [0, 5] + [9] * 31


@pytest.mark.parametrize(("documents", "slots"), [(1, 32), (32, 32), (33, 64), (512, 512), (513, 513), (1000, 1000)])
def test_a_kernel_has_the_slots_of_transformer_engine(documents, slots):
    assert kernel_documents(documents) == slots


@pytest.mark.parametrize(
    ("tokens", "room"),
    [(1, 1024), (1024, 1024), (1025, 2048), (32_768, 32_768), (32_769, 65_536), (65_536, 65_536), (65_537, 98_304)],
)
def test_a_kernel_has_the_room_of_transformer_engine(tokens, room):
    assert kernel_tokens(tokens) == room
