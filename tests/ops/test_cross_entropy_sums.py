"""Sums of token losses by group, against loops in plain Python."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.ops.linear_cross_entropy import linear_cross_entropy
from nemo_prolong.ops.token_loss import loss_sums, position_buckets

TOKENS = st.lists(st.tuples(st.floats(0, 20, width=32), st.sampled_from([0.0, 1.0]), st.integers(-1, 4)), max_size=40)


@settings(deadline=None, max_examples=60)
@given(tokens=TOKENS)
def test_sums_and_counts_are_those_of_a_loop(tokens: list[Any]) -> None:
    losses, mask, groups = (list(column) for column in zip(*tokens, strict=True)) if tokens else ([], [], [])
    result = loss_sums(torch.tensor(losses), torch.tensor(mask), torch.tensor(groups, dtype=torch.int64), 4)
    assert (result.sums.dtype, result.counts.dtype) == (torch.float64, torch.int64)
    for group in range(4):
        members = [loss for loss, factor, number in tokens if factor and number == group]
        assert result.counts[group] == len(members)
        assert math.isclose(result.sums[group], math.fsum(members), rel_tol=1e-12)


def test_a_masked_loss_that_is_not_a_number_does_not_count() -> None:
    result = loss_sums(torch.tensor([math.nan, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), 1)
    assert result.sums.tolist() == [2.0] and result.counts.tolist() == [1]


def test_buckets_begin_at_their_start_and_the_last_is_open() -> None:
    positions = torch.tensor([[0, 1, 2, 7, 8, 9, 10**6]])
    assert position_buckets(positions, torch.tensor([2, 8, 9])).tolist() == [[-1, -1, 0, 0, 1, 2, 2]]


def test_token_losses_can_be_summed_before_and_after_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 4, generator=generator, requires_grad=True) for rows in (6, 9))
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    head = linear_cross_entropy(hidden, weight, torch.arange(6), mask)
    groups = position_buckets(torch.arange(6), torch.tensor([0, 3]))
    before = loss_sums(head.token_losses, mask, groups, 2)
    head.loss_sum.backward()
    after = loss_sums(head.token_losses, mask, groups, 2)
    assert torch.equal(before.sums, after.sums) and not before.sums.requires_grad
    assert before.counts.tolist() == [2, 2]
    assert math.isclose(before.sums.sum(), head.loss_sum, rel_tol=1e-6)
