"""The kernels that a test machine does not use by itself: tiles in plain torch, and the packed call of CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_prolong.ops import attention, attention_kernels
from nemo_prolong.ops.attention import AttentionBlock, document_attention
from nemo_prolong.ops.attention_kernels import (
    EqualSpans,
    PackedCall,
    PackedSpans,
    flash_kernel_takes,
    tiled_backward,
    tiled_forward,
)
from nemo_prolong.ops.context_parallel import DocumentPartition
from tests.support.attention_tools import (
    HEAD_DIMENSIONS,
    QUERY_HEADS,
    LargestTensor,
    boundaries,
    dense_attention,
    random_inputs,
    random_weights,
)


def assert_equal_to_the_last_digits(actual: Any, expected: Any) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "causal"),
    [(300, 1, 1, True), (3, 256, 256, True), (1, 257, 257, True), (2, 300, 13, False), (1, 5, 600, False)],
)
def test_tiles_give_what_the_flash_kernel_gives(batch: int, queries: int, keys: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, QUERY_HEADS, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 8)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, is_causal=causal, scale=0.6)
    actual = tiled_forward(*inputs, causal, 0.6)
    assert_equal_to_the_last_digits(actual, expected)
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    expected_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *inputs, *expected, 0.0, causal, scale=0.6
    )
    assert_equal_to_the_last_digits(tiled_backward(grad, *inputs, *actual, causal, 0.6), expected_gradients)


@pytest.mark.parametrize(("batch", "length"), [(1, 4096), (4096, 1), (2, 4096), (4096, 16)])
def test_tiles_never_hold_more_scores_than_those_of_one_tile(batch: int, length: int) -> None:
    query = torch.zeros(batch, 1, length, 8)
    with LargestTensor() as largest:
        output, lse = tiled_forward(query, query, query, True, 1.0)
        tiled_backward(query, query, query, query, output, lse, True, 1.0)
    assert largest.numel <= max(query.numel(), 256 * 256)


def packed_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, scale: float) -> Any:
    """Stand in for ``aten::_flash_attention_forward`` on CPU: run after run, with its shapes."""
    cu_queries, cu_keys, max_queries, max_keys, dropout, causal, returns_mask = arguments
    assert (
        dropout == 0.0
        and not returns_mask
        and max_queries == cu_queries.diff().max()
        and max_keys == cu_keys.diff().max()
    )
    outputs, lses = [], []
    for q, k, v in runs_of(query, key, value, cu_queries, cu_keys):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, dim=1), None, None, None


def packed_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, scale: float
) -> Any:
    """Stand in for ``aten::_flash_attention_backward`` likewise."""
    output, lse, cu_queries, cu_keys, _, _, dropout, causal, _, _ = arguments
    assert dropout == 0.0 and lse.shape == (query.size(1), query.size(0)) and lse.is_contiguous()
    gradients: list[list[torch.Tensor]] = [[], [], []]
    grad_outputs = runs_of(grad, output, lse.T.unsqueeze(-1), cu_queries, cu_queries)
    for (q, k, v), (g, o, run_lse) in zip(runs_of(query, key, value, cu_queries, cu_keys), grad_outputs, strict=True):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, run_lse.squeeze(-1), 0.0, causal, scale=scale
        )
        for name, part in zip(gradients, parts, strict=True):
            name.append(part[0].transpose(0, 1))
    return tuple(torch.cat(parts) for parts in gradients)


def runs_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_queries: Any, cu_keys: Any) -> list[Any]:
    parts = [x.split(cu.diff().tolist()) for x, cu in ((query, cu_queries), (key, cu_keys), (value, cu_keys))]
    return [tuple(x.transpose(0, 1)[None] for x in run) for run in zip(*parts, strict=True)]


@pytest.fixture
def packed_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send attention through the packed calls, with the stand-ins as kernel."""
    monkeypatch.setattr(attention, "flash_kernel_takes", lambda query: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", packed_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", packed_backward)


@pytest.mark.usefixtures("packed_kernel")
@pytest.mark.parametrize("max_seqlen", [None, 12])
def test_packed_calls_give_what_dense_attention_gives(max_seqlen: int | None) -> None:
    lengths = [12, 1, 7, 7]
    inputs = random_inputs(sum(lengths), 2)
    expected, _ = dense_attention(*inputs, lengths, HEAD_DIMENSIONS**-0.5)
    actual = document_attention(*inputs, boundaries(lengths), max_seqlen=max_seqlen)
    weights = random_weights(sum(lengths))
    assert_equal_to_the_last_digits([actual], [expected])
    assert_equal_to_the_last_digits(
        torch.autograd.grad(actual, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


@pytest.mark.usefixtures("packed_kernel")
@pytest.mark.parametrize(("mode", "seen"), [("default", 0), ("warn", 2), ("error", 2)])
def test_the_packed_call_repeats_its_sums_when_deterministic(
    mode: str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU; it looks for mode 2 (error) and takes any other as leave to change its order."""
    modes: list[int] = []

    def backward(*arguments: Any, scale: float) -> Any:
        modes.append(torch.get_deterministic_debug_mode())
        return packed_backward(*arguments, scale=scale)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    inputs = random_inputs(8, 2)
    torch.set_deterministic_debug_mode(mode)
    try:
        before = torch.get_deterministic_debug_mode()
        document_attention(*inputs, boundaries([8]), max_seqlen=8).sum().backward()
        assert modes == [seen] and torch.get_deterministic_debug_mode() == before
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.usefixtures("packed_kernel")
@pytest.mark.parametrize("rank", [0, 1])
def test_packed_calls_of_a_block_are_its_batched_calls(rank: int) -> None:
    partition = DocumentPartition.of_row(boundaries([9, 1, 0, 16]), 2, rank)
    inputs = [x.detach() for x in random_inputs(partition.shard_length, 2)]
    for block in (partition.own_block, partition.block_of_earlier_rank, partition.block_of_later_rank):
        packed = attention.attention_with_lse(*inputs, block)
        gradients = [tuple(torch.zeros_like(x) for x in inputs) for _ in range(2)]
        attention.attention_backward(gradients[0], inputs[0], *inputs, *packed, block)
        with pytest.MonkeyPatch.context() as batched_instead:
            batched_instead.setattr(attention, "flash_kernel_takes", lambda query: False)
            assert_equal_to_the_last_digits(packed, attention.attention_with_lse(*inputs, block))
            attention.attention_backward(gradients[1], inputs[0], *inputs, *packed, block)
        assert_equal_to_the_last_digits(*gradients)


def test_the_packed_call_is_of_spans_that_have_queries_and_keys() -> None:
    starts = np.array([0, 3, 7, 9])
    block = AttentionBlock(starts, np.array([3, 0, 2, 1]), starts, np.array([0, 4, 2, 1]), False, torch.device("cpu"))
    (call,) = block._packed_calls
    assert call.queries.cu_seqlens.tolist() == call.keys.cu_seqlens.tolist() == [0, 2, 3]
    assert call.queries.index.tolist() == [7, 8, 9]
    nothing = AttentionBlock(starts[:2], np.array([3, 0]), starts[:2], np.array([0, 4]), False, torch.device("cpu"))
    assert nothing._packed_calls == []


def test_torch_takes_the_arguments_of_the_packed_call() -> None:
    """torch checks them against the kernel's schema on tensors without data; the numbers need a GPU."""
    query, key = (torch.empty(24, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    spans = PackedSpans(torch.empty(3, dtype=torch.int32, device="meta"), 16)
    call = PackedCall(spans, spans, causal=True)
    output, lse = call.forward(query, key, key, 0.125)
    assert output.shape == query.shape and output.dtype == query.dtype
    assert lse.shape == (24, 4) and lse.dtype == torch.float32
    gradients = call.backward(output, query, key, key, output, lse.T, 0.125)
    assert [x.shape for x in gradients] == [query.shape, key.shape, key.shape]


def test_the_packed_call_is_the_one_of_varlen_attention() -> None:
    """If torch changes the kernel under its own function, this call must follow."""
    import inspect

    from torch.nn.attention import varlen

    source = inspect.getsource(varlen)
    assert (
        "torch.ops.aten._flash_attention_forward(" in source and "torch.ops.aten._flash_attention_backward(" in source
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cpu_the_packed_call_is_not_used(dtype: torch.dtype) -> None:
    assert not flash_kernel_takes(torch.empty(4, 2, 64, dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "takes"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 8, True),
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 12, False),
        (torch.float32, 64, False),
    ],
)
def test_the_packed_call_takes_16_bits_and_heads_in_eights(dtype: torch.dtype, head_dim: int, takes: bool) -> None:
    query: Any = SimpleNamespace(is_cuda=True, dtype=dtype, size=(4, 2, head_dim).__getitem__)
    assert flash_kernel_takes(query) is takes


@pytest.mark.parametrize("lengths", [[7, 7, 7], [12, 1, 300, 7]])
def test_what_no_flash_kernel_takes_is_computed_in_tiles(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = random_inputs(sum(lengths), 2), random_weights(sum(lengths))
    expected, _ = dense_attention(*inputs, lengths, HEAD_DIMENSIONS**-0.5)
    expected_gradients = torch.autograd.grad(expected, inputs, weights)
    # As on a GPU with fp32. There it is another kernel, or none, that this machine has.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    actual = document_attention(*inputs, boundaries(lengths))
    assert_equal_to_the_last_digits([actual], [expected])
    assert_equal_to_the_last_digits(torch.autograd.grad(actual, inputs, weights), expected_gradients)


def test_spans_that_are_evenly_spaced_are_a_view_of_the_row() -> None:
    row = torch.arange(40.0).view(20, 2)
    spaced, uneven = EqualSpans(np.array([1, 6, 11]), 3), EqualSpans(np.array([0, 4, 11]), 3)
    for spans, is_view in ((spaced, True), (EqualSpans(np.array([5]), 4), True), (uneven, False)):
        taken = spans.take(row)
        assert torch.equal(taken, torch.stack([row[start : start + spans.length] for start in spans.starts]))
        assert (taken.untyped_storage().data_ptr() == row.untyped_storage().data_ptr()) == is_view


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 12)])
def test_on_a_gpu_results_are_those_of_float64_on_cpu(dtype: torch.dtype, head_dim: int) -> None:
    lengths = [130, 1, 257, 300]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        leaves = [x.to(device, kind).requires_grad_() for x in inputs]
        output = document_attention(*leaves, boundaries(lengths).to(device))
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        results.append([x.cpu().double() for x in (output, *gradients)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_accumulation_is_never_in_sixteen_bits() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert attention_kernels.accumulation_dtype(dtype) == torch.float32
