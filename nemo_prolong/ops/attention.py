"""Causal attention inside documents, for packed rows, and its partial results.

Owns the layout of packed attention (``thd``: tokens, heads, head dim). No [T, T] mask or score tensor exists: time is
the sum of squared document lengths, memory is linear in the tokens.

Attention to a part of the keys is a *partial result* of output and log-sum-exp of the scores. Partial results of
disjoint parts merge into the attention to all keys. Backward, every part takes the merged output and log-sum-exp, and
its gradients simply add up. So nothing but the merged result is kept between the passes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from nemo_prolong.ops.attention_kernels import (
    BatchedCall,
    EqualSpans,
    Gradients,
    PackedCall,
    PackedSpans,
    accumulation_dtype,
    flash_kernel_takes,
    merge_partials,
)

KernelCalls = list[BatchedCall] | list[PackedCall]


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """Which queries of a row see which keys: span i of the queries attends to span i of the keys.

    Spans of queries do not overlap each other, nor do spans of keys. Spans of length 0 are allowed. A block is made
    once per row and used by every layer.

    Args:
        query_starts: First query of each span, int64 [N].
        query_lengths: Queries of each span, int64 [N].
        key_starts: First key of each span, int64 [N].
        key_lengths: Keys of each span, int64 [N].
        causal: Query j of a span sees keys 0 to j of it, and lengths are equal; else every query sees every key.
        device: Where the tensors are.
    """

    query_starts: NDArray[np.int64]
    query_lengths: NDArray[np.int64]
    key_starts: NDArray[np.int64]
    key_lengths: NDArray[np.int64]
    causal: bool
    device: torch.device

    def __post_init__(self) -> None:
        assert not self.causal or np.array_equal(self.query_lengths, self.key_lengths), "causal spans are square"

    @classmethod
    def of_documents(cls, boundaries: NDArray[np.int64], device: torch.device) -> AttentionBlock:
        """Return the block of whole documents with ``boundaries`` int64 [D+1]."""
        starts, lengths = boundaries[:-1], np.diff(boundaries)
        return cls(starts, lengths, starts, lengths, causal=True, device=device)

    def calls(self, query: torch.Tensor) -> KernelCalls:
        """Return the kernel calls that compute this block on tensors like ``query``."""
        return self._packed_calls if flash_kernel_takes(query) else self._batched_calls

    @cached_property
    def _batched_calls(self) -> list[BatchedCall]:
        """One call for each pair of lengths, in order of first appearance."""
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        lengths = zip(self.query_lengths.tolist(), self.key_lengths.tolist(), strict=True)
        for number, (queries, keys) in enumerate(lengths):
            if queries and keys:
                members[queries, keys].append(number)
        return [
            BatchedCall(
                EqualSpans(self.query_starts[numbers], queries), EqualSpans(self.key_starts[numbers], keys), self.causal
            )
            for (queries, keys), numbers in members.items()
        ]

    @cached_property
    def _packed_calls(self) -> list[PackedCall]:
        used = (self.query_lengths > 0) & (self.key_lengths > 0)
        if not used.any():
            return []
        queries = _packed_spans(self.query_starts[used], self.query_lengths[used], self.device)
        keys = _packed_spans(self.key_starts[used], self.key_lengths[used], self.device)
        return [PackedCall(queries, keys, self.causal)]


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    softmax_scale: float | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Return causal attention in which every token sees its own document only.

    Args:
        query: Queries [T, H, C].
        key: Keys [T, K, C] with K dividing H (grouped-query attention).
        value: Values [T, K, C].
        cu_seqlens: Document boundaries, int32 [D+1], from 0 to T, non-decreasing; documents of length 0 are allowed.
        softmax_scale: Factor on the scores. ``C ** -0.5`` by default.
        max_seqlen: Length of the longest document, if known. On CUDA it saves a wait for the device in each call.

    Returns:
        Attention output [T, H, C] in the dtype of ``query``.
    """
    calls = _document_calls(query, cu_seqlens, max_seqlen)
    output: torch.Tensor = _DocumentAttention.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        query, key, value, calls, _scale(query, softmax_scale)
    )
    return output


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: AttentionBlock,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial result of one block. It is not differentiable, and its backward is ``attention_backward``.

    Args:
        query: Queries [T, H, C].
        key: Keys [M, K, C] with K dividing H.
        value: Values [M, K, C].
        block: Which queries see which keys.
        softmax_scale: Factor on the scores. ``C ** -0.5`` by default.

    Returns:
        Output [T, H, C] in the dtype of ``query`` and log-sum-exp of the scores [H, T], float32 (float64 of float64).
        A query that sees no key has output 0 and log-sum-exp minus infinity.
    """
    output, lse = empty_partial(query, query.dtype)
    with torch.no_grad():
        _forward_into(output, lse, query, key, value, block.calls(query), _scale(query, softmax_scale))
    return output, lse


def empty_partial(query: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partial result of no keys: output zeros [T, H, C] and log-sum-exp minus infinity [H, T].

    Args:
        query: Queries [T, H, C].
        dtype: Of the output. By default the dtype that partial results are summed in.
    """
    tokens, heads, _ = query.shape
    summed = accumulation_dtype(query.dtype)
    output = torch.zeros(query.shape, dtype=dtype or summed, device=query.device)
    # Tokens first in memory, as the kernel on CPU wants it.
    return output, torch.full((tokens, heads), -math.inf, dtype=summed, device=query.device).T


@torch.no_grad()
def merge_attention(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: AttentionBlock,
    softmax_scale: float | None = None,
) -> None:
    """Merge the attention of ``block`` into a partial result, in place.

    Args:
        output: Attention so far [T, H, C], in the dtype of ``empty_partial``.
        lse: Log-sum-exp so far [H, T].
        query: Queries [T, H, C].
        key: Keys [M, K, C], none of which these queries have seen yet.
        value: Values [M, K, C].
        block: Which queries see which keys.
        softmax_scale: Factor on the scores. ``C ** -0.5`` by default.
    """
    scale = _scale(query, softmax_scale)
    for call in block.calls(query):
        new_output, new_lse = call.forward(query, key, value, scale)
        merged = merge_partials(call.queries.take(output), call.queries.take(lse.T), new_output, new_lse)
        call.queries.put(output, merged[0])
        call.queries.put(lse.T, merged[1])


@torch.no_grad()
def attention_backward(
    gradients: Gradients,
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    block: AttentionBlock,
    softmax_scale: float | None = None,
) -> None:
    """Add the gradients that flow through ``block`` to ``gradients``.

    Args:
        gradients: Of query [T, H, C], key and value [M, K, C], in any dtype that holds their sums; changed in place.
        grad_output: Gradient of the merged output [T, H, C].
        query: As in the forward pass, as are ``key``, ``value`` and ``block``.
        key: [M, K, C].
        value: [M, K, C].
        output: The merged output of all blocks [T, H, C], in the dtype of ``query``.
        lse: The merged log-sum-exp [H, T].
        block: Which queries see which keys.
        softmax_scale: Factor on the scores. ``C ** -0.5`` by default.
    """
    calls, scale = block.calls(query), _scale(query, softmax_scale)
    _backward_into(gradients, grad_output, query, key, value, output, lse, calls, scale)


class _DocumentAttention(torch.autograd.Function):
    """Attention of calls that cover every query and every key once."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        calls: KernelCalls,
        scale: float,
    ) -> torch.Tensor:
        output, lse = empty_partial(query, query.dtype)
        _forward_into(output, lse, query, key, value, calls, scale)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.calls, ctx.scale = calls, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        _backward_into(gradients, grad_output, query, key, value, output, lse, ctx.calls, ctx.scale)
        return *gradients, None, None


def _forward_into(
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calls: KernelCalls,
    scale: float,
) -> None:
    """Write the results of calls without a common query."""
    for call in calls:
        call_output, call_lse = call.forward(query, key, value, scale)
        call.queries.put(output, call_output)
        call.queries.put(lse.T, call_lse)


def _backward_into(
    gradients: Gradients,
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    calls: KernelCalls,
    scale: float,
) -> None:
    """Add the gradients of all calls."""
    for call in calls:
        added = call.backward(grad_output, query, key, value, output, lse, scale)
        for spans, total, part in zip((call.queries, call.keys, call.keys), gradients, added, strict=True):
            spans.add(total, part)


def _document_calls(query: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | None) -> KernelCalls:
    """Return the kernel calls of whole documents."""
    if flash_kernel_takes(query):
        # Boundaries stay on the device, because reading them would make the host wait.
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else max_seqlen
        spans = PackedSpans(cu_seqlens, longest)
        return [PackedCall(spans, spans, causal=True)]
    boundaries = cu_seqlens.cpu().numpy().astype(np.int64)
    assert boundaries[0] == 0 and boundaries[-1] == query.size(0), (boundaries, query.shape)
    return AttentionBlock.of_documents(boundaries, query.device).calls(query)


def _packed_spans(starts: NDArray[np.int64], lengths: NDArray[np.int64], device: torch.device) -> PackedSpans:
    """Return spans of length >= 1 with their index and boundaries on the device."""
    ends = lengths.cumsum()
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    cu_seqlens = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)).to(device)
    return PackedSpans(cu_seqlens, int(lengths.max()), torch.from_numpy(index).to(device))


def _scale(query: torch.Tensor, softmax_scale: float | None) -> float:
    return query.size(-1) ** -0.5 if softmax_scale is None else softmax_scale
