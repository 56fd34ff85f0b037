"""Attention inside documents, against a dense masked softmax written out by hand in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_prolong.ops.attention import document_attention

QUERY_HEADS, HEAD_DIMENSIONS = 4, 8

_MIXED = st.lists(st.integers(0, 13), min_size=1, max_size=9).filter(any)
_EQUAL = st.builds(lambda length, count: [length] * count, st.integers(1, 13), st.integers(1, 6))
_WHOLE_ROW = st.builds(lambda length: [length], st.integers(1, 70))
_GROUPED = st.lists(st.sampled_from([0, 1, 7, 16]), min_size=4, max_size=9).filter(any)
DOCUMENT_LENGTHS = st.one_of(_MIXED, _EQUAL, _WHOLE_ROW, _GROUPED)
KEY_HEADS = st.sampled_from([1, 2, QUERY_HEADS])


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_inputs(tokens: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return query, key and value as strided slices of one projection, the way Megatron hands them over."""
    generator = torch.Generator().manual_seed(tokens)
    heads = (QUERY_HEADS, key_heads, key_heads)
    fused = torch.randn(tokens, sum(heads), HEAD_DIMENSIONS, generator=generator, dtype=torch.float64).to(dtype)
    return [part.requires_grad_() for part in fused.split(heads, dim=1)]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], softmax_scale: float
) -> torch.Tensor:
    """Return the attention of all tokens to all tokens, masked to the past of the own document."""
    group = query.size(1) // key.size(1)
    key, value = (torch.stack([x[:, head // group] for head in range(query.size(1))], dim=1) for x in (key, value))
    document = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    position = torch.arange(len(document))
    visible = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    scores = torch.einsum("qhc,khc->hqk", query, key) * softmax_scale
    return torch.einsum("hqk,khc->qhc", scores.masked_fill(~visible, -math.inf).softmax(-1), value)


@settings(deadline=None, max_examples=60)
@given(lengths=DOCUMENT_LENGTHS, key_heads=KEY_HEADS)
def test_outputs_and_gradients_are_those_of_dense_masked_attention(lengths: list[int], key_heads: int) -> None:
    inputs = random_inputs(sum(lengths), key_heads)
    expected = dense_attention(*inputs, lengths, HEAD_DIMENSIONS**-0.5)
    actual = document_attention(*inputs, boundaries(lengths))
    assert actual.shape == inputs[0].shape
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(actual, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


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
    torch.testing.assert_close(actual, dense_attention(*inputs, lengths, 0.9), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lengths", [[512], [1, 130, 0, 253, 128], [64] * 8])
def test_float32_stays_within_1e_5_of_float64(lengths: list[int]) -> None:
    inputs = random_inputs(sum(lengths), 2, torch.float32)
    actual = document_attention(*inputs, boundaries(lengths))
    assert actual.dtype == torch.float32
    expected = dense_attention(*(x.double() for x in inputs), lengths, HEAD_DIMENSIONS**-0.5)
    assert (actual.double() - expected).abs().max() < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
        return result


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
