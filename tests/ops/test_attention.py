"""Attention inside documents, against a dense masked softmax written out by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.ops.attention import (
    AttentionBlock,
    attention_backward,
    attention_with_lse,
    document_attention,
    empty_partial,
    merge_attention,
)
from tests.support.attention_tools import (
    HEAD_DIMENSIONS,
    QUERY_HEADS,
    LargestTensor,
    boundaries,
    dense_attention,
    random_inputs,
    random_weights,
)

_MIXED = st.lists(st.integers(0, 13), min_size=1, max_size=9).filter(any)
_EQUAL = st.builds(lambda length, count: [length] * count, st.integers(1, 13), st.integers(1, 6))
_WHOLE_ROW = st.builds(lambda length: [length], st.integers(1, 70))
_GROUPED = st.lists(st.sampled_from([0, 1, 7, 16]), min_size=4, max_size=9).filter(any)
DOCUMENT_LENGTHS = st.one_of(_MIXED, _EQUAL, _WHOLE_ROW, _GROUPED)
KEY_HEADS = st.sampled_from([1, 2, QUERY_HEADS])


@settings(deadline=None, max_examples=60)
@given(lengths=DOCUMENT_LENGTHS, key_heads=KEY_HEADS)
def test_results_are_those_of_dense_masked_attention(lengths: list[int], key_heads: int) -> None:
    inputs = random_inputs(sum(lengths), key_heads)
    expected, _ = dense_attention(*inputs, lengths, HEAD_DIMENSIONS**-0.5)
    actual = document_attention(*inputs, boundaries(lengths))
    assert actual.shape == inputs[0].shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = random_weights(sum(lengths))
    for got, wanted in zip(
        torch.autograd.grad(actual, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(lengths=DOCUMENT_LENGTHS, key_heads=KEY_HEADS, data=st.data())
def test_a_changed_document_changes_no_bit_of_any_other(lengths: list[int], key_heads: int, data: Any) -> None:
    number = data.draw(st.sampled_from([n for n, length in enumerate(lengths) if length]))
    start = sum(lengths[:number])
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    inside[start : start + lengths[number]] = True
    inputs = [x.detach() for x in random_inputs(sum(lengths), key_heads, torch.float32)]
    before = document_attention(*inputs, boundaries(lengths))
    # Not-a-number survives a multiplication by zero: a mask that hides a score but reads the value would show.
    for poison in (3.0, math.nan):
        changed = [torch.where(inside[:, None, None], x * poison, x) for x in inputs]
        after = document_attention(*changed, boundaries(lengths))
        assert torch.equal(after[~inside], before[~inside])
        assert not torch.equal(after[inside], before[inside])


@pytest.mark.parametrize("lengths", [[12], [3, 5, 3, 1]])
def test_a_softmax_scale_replaces_the_default(lengths: list[int]) -> None:
    inputs = random_inputs(sum(lengths), 2)
    actual = document_attention(*inputs, boundaries(lengths), softmax_scale=0.9)
    expected, _ = dense_attention(*inputs, lengths, 0.9)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[512], [1, 130, 0, 253, 128], [64] * 8])
def test_float32_stays_within_1e_5_of_float64(lengths: list[int]) -> None:
    inputs = random_inputs(sum(lengths), 2, torch.float32)
    actual = document_attention(*inputs, boundaries(lengths))
    assert actual.dtype == torch.float32
    expected, _ = dense_attention(*(x.double() for x in inputs), lengths, HEAD_DIMENSIONS**-0.5)
    assert (actual.double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "lengths", [[64] * 64, [32, 96] * 32, [4096]], ids=["equal documents", "two lengths", "one document"]
)
def test_no_tensor_grows_with_the_square_of_the_tokens(lengths: list[int]) -> None:
    tokens = 4096
    inputs = random_inputs(tokens, 2, torch.float32)
    with LargestTensor() as largest:
        document_attention(*inputs, boundaries(lengths)).sum().backward()
    # Nothing is larger than the queries, not even the scores inside the documents.
    assert tokens <= largest.numel <= tokens * QUERY_HEADS * HEAD_DIMENSIONS < tokens**2 / 100


@pytest.mark.parametrize("lengths", [[12], [3, 5, 3, 1], [2, 3, 3, 2]])
def test_tensors_of_any_strides_are_read_as_they_are(lengths: list[int]) -> None:
    dense = random_inputs(sum(lengths), 2)
    permuted = [x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_() for x in dense]
    spaced = [x.detach().repeat_interleave(2, dim=2)[..., ::2].requires_grad_() for x in dense]
    assert all(x.stride(-1) == 2 for x in spaced)
    weights = random_weights(sum(lengths))
    results = []
    for inputs in (dense, permuted, spaced):
        output = document_attention(*inputs, boundaries(lengths))
        results.append((output, *torch.autograd.grad(output, inputs, weights)))
    for got, wanted in [*zip(results[1], results[0], strict=True), *zip(results[2], results[0], strict=True)]:
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def cut_into_blocks(lengths: list[int], fractions: list[float]) -> list[AttentionBlock]:
    """Return blocks that together are causal documents: each document cut in two, its first part seen by its second."""
    starts = np.concatenate(([0], np.cumsum(lengths)))[:-1]
    first = np.array([int(length * fraction) for length, fraction in zip(lengths, fractions, strict=True)])
    second = np.array(lengths) - first
    device = torch.device("cpu")
    return [
        AttentionBlock(starts, first, starts, first, True, device),
        AttentionBlock(starts + first, second, starts, first, False, device),
        AttentionBlock(starts + first, second, starts + first, second, True, device),
    ]


@settings(deadline=None, max_examples=60)
@given(lengths=DOCUMENT_LENGTHS, key_heads=KEY_HEADS, data=st.data())
def test_partial_results_merge_forward_and_backward(lengths: list[int], key_heads: int, data: Any) -> None:
    fractions = data.draw(st.lists(st.floats(0, 1), min_size=len(lengths), max_size=len(lengths)))
    order = data.draw(st.permutations(cut_into_blocks(lengths, fractions)))
    inputs = random_inputs(sum(lengths), key_heads)
    expected, expected_lse = dense_attention(*inputs, lengths, 0.7)
    output, lse = empty_partial(inputs[0])
    for block in order:
        merge_attention(output, lse, *inputs, block, 0.7)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    weights = random_weights(sum(lengths))
    gradients = tuple(torch.zeros_like(x) for x in inputs)
    for block in order:
        attention_backward(gradients, weights, *(x.detach() for x in inputs), output, lse, block, 0.7)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "lse_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_query_without_keys_has_output_zero(dtype: torch.dtype, lse_dtype: torch.dtype) -> None:
    inputs = random_inputs(10, 2, dtype)
    block = AttentionBlock(*(np.array(x) for x in ([2, 6], [3, 2], [0, 4], [4, 0])), False, torch.device("cpu"))
    output, lse = attention_with_lse(*inputs, block)
    seeing = torch.tensor([2, 3, 4])
    blind = torch.tensor([0, 1, 5, 6, 7, 8, 9])
    assert output.dtype == dtype and lse.dtype == lse_dtype and lse.shape == (QUERY_HEADS, 10)
    assert (output[blind] == 0).all() and (lse[:, blind] == -math.inf).all(), "nothing to see: 0 and minus infinity"
    assert (output[seeing] != 0).all() and lse[:, seeing].isfinite().all()


def test_a_causal_block_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(AssertionError, match="square"):
        AttentionBlock(*(np.array(x) for x in ([0], [3], [0], [4])), True, torch.device("cpu"))


def test_bfloat16_parts_merge_without_losing_more_than_one_kernel() -> None:
    lengths = [200]
    inputs = random_inputs(200, 2, torch.bfloat16)
    exact, _ = dense_attention(*(x.double() for x in inputs), lengths, HEAD_DIMENSIONS**-0.5)
    whole = document_attention(*inputs, boundaries(lengths))
    output, lse = empty_partial(inputs[0])
    for block in cut_into_blocks(lengths, [0.5]):
        merge_attention(output, lse, *inputs, block)
    assert output.dtype == torch.float32, "partial results are summed in float32"
    error, error_of_whole = ((x.double() - exact).abs().max() for x in (output.bfloat16(), whole))
    assert error <= 1.5 * error_of_whole, (error, error_of_whole)
