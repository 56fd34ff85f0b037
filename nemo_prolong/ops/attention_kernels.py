"""The kernels under document attention, and how spans of tokens of a packed row reach them.

A kernel call attends N spans of queries to N spans of keys: without a mask, or causally where both have one length. It
returns the log-sum-exp of the scores next to the output, which is what merging partial results and a backward pass
without stored scores need. Three kernels, all of linear memory:

- CPU: torch's flash kernel, spans of one length as one batch.
- CUDA, 16-bit: the flash kernel that ``torch.nn.attention.varlen.varlen_attn`` calls, all spans at once. It is called
  below that function, because the function's own backward drops the gradient that merging sends to a partial result.
- Anything else (fp32 on CUDA): tiles in plain torch, batched as on CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

_TILE = 256

_WARN = 1
"""torch's ``warn_only`` among its modes of determinism."""

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class EqualSpans:
    """B spans of tokens that have one length; they are taken as [B, length, ...].

    Args:
        starts: First token of every span, ascending, int64 [B].
        length: Tokens of each span, at least 1.
    """

    starts: NDArray[np.int64]
    length: int

    @cached_property
    def _step(self) -> int | None:
        """Distance of neighbouring starts where it is constant: such spans are a view of the row."""
        steps = np.unique(np.diff(self.starts))
        return int(steps[0]) if len(steps) == 1 else (0 if len(steps) == 0 else None)

    @cached_property
    def _index(self) -> torch.Tensor:
        return torch.from_numpy((self.starts[:, None] + np.arange(self.length)).reshape(-1))

    def _view(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        stride = rows.stride()
        return rows.as_strided(
            (len(self.starts), self.length, *rows.shape[1:]),
            (step * stride[0], *stride),
            rows.storage_offset() + int(self.starts[0]) * stride[0],
        )

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the spans of ``rows`` [T, ...] as [B, length, ...], without a copy where they are evenly spaced."""
        if self._step is not None:
            return self._view(rows, self._step)
        taken = rows.index_select(0, self._index.to(rows.device))
        return taken.view(len(self.starts), self.length, *rows.shape[1:])

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the spans of ``rows`` with ``values`` [B, length, ...]."""
        if self._step is not None:
            self._view(rows, self._step).copy_(values)
        else:
            rows.index_copy_(0, self._index.to(rows.device), values.flatten(0, 1).to(rows.dtype))

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add ``values`` [B, length, ...] to the spans of ``rows``; no token is in two spans."""
        if self._step is not None:
            self._view(rows, self._step).add_(values)
        else:
            rows.index_add_(0, self._index.to(rows.device), values.flatten(0, 1).to(rows.dtype))


@dataclass(frozen=True, eq=False)
class PackedSpans:
    """N spans of tokens of any length, taken one after the other as [tokens, ...].

    Args:
        cu_seqlens: Where each span begins among the taken tokens, int32 [N+1] on the device.
        max_seqlen: Length of the longest span.
        index: Tokens of the spans in the row, int64 [tokens] on the device; None when they are the whole row in order.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    index: torch.Tensor | None = None

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the spans [tokens, ...] from ``rows`` [T, ...]."""
        return rows if self.index is None else rows.index_select(0, self.index)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Overwrite the tokens of the spans in ``rows`` with ``values`` [tokens, ...]."""
        if self.index is None:
            rows.copy_(values)
        else:
            rows.index_copy_(0, self.index, values.to(rows.dtype))

    def add(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add ``values`` [tokens, ...] to the tokens of the spans in ``rows``."""
        if self.index is None:
            rows.add_(values)
        else:
            rows.index_add_(0, self.index, values.to(rows.dtype))


@dataclass(frozen=True, eq=False)
class BatchedCall:
    """One kernel call on spans of one length, for CPU and for what the CUDA flash kernel refuses."""

    queries: EqualSpans
    keys: EqualSpans
    causal: bool

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output [B, queries, H, C] and log-sum-exp of the scores [B, queries, H] of the spans of a row."""
        taken = self._taken(query, key, value)
        if query.is_cpu:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *taken, is_causal=self.causal, scale=scale
            )
        else:
            out, lse = tiled_forward(*taken, causal=self.causal, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> Gradients:
        """Return the gradients of the spans of query [B, queries, H, C], key and value [B, keys, K, C].

        Args:
            grad_output: [T, H, C], as are ``query`` and ``output``.
            query: Rows; this call takes its spans of them.
            key: [M, K, C], as is ``value``.
            value: As ``key``.
            output: Merged output of all calls that share these queries.
            lse: Log-sum-exp over all keys that these queries see [H, T].
            scale: Factor on the scores.
        """
        grad_spans, out_spans = (_heads_first(self.queries.take(x)) for x in (grad_output, output))
        taken = self._taken(query, key, value)
        lse_spans = self.queries.take(lse.T).transpose(1, 2)
        if query.is_cpu:
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_spans, *taken, out_spans, lse_spans, 0.0, self.causal, scale=scale
            )
        else:
            gradients = tiled_backward(grad_spans, *taken, out_spans, lse_spans, self.causal, scale)
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in gradients)
        return grad_query, grad_key, grad_value

    def _taken(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        taken = self.queries.take(query), self.keys.take(key), self.keys.take(value)
        return _heads_first(taken[0]), _heads_first(taken[1]), _heads_first(taken[2])


@dataclass(frozen=True, eq=False)
class PackedCall:
    """One call of the CUDA flash kernel on all spans of a block."""

    queries: PackedSpans
    keys: PackedSpans
    causal: bool

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output [queries, H, C] and the log-sum-exp of the scores [queries, H] of the spans of a row."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *self._taken(query, key, value),
            *self._lengths,
            0.0,
            self.causal,
            False,
            scale=scale,
        )
        return out, lse.T

    def backward(
        self,
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> Gradients:
        """Return the gradients of the spans: query [queries, H, C], key and value [keys, K, C], as ``BatchedCall``."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        with _repeatable_sums_if_asked():
            gradients: Gradients = torch.ops.aten._flash_attention_backward(
                self.queries.take(grad_output).contiguous(),
                *self._taken(query, key, value),
                _dense(self.queries.take(output)),
                self.queries.take(lse.T).T.contiguous(),
                *self._lengths,
                0.0,
                self.causal,
                no_dropout,
                torch.empty(0, device=query.device),
                scale=scale,
            )
        return gradients

    def _taken(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Iterator[torch.Tensor]:
        spans = (self.queries, self.keys, self.keys)
        return (_dense(span.take(x)) for span, x in zip(spans, (query, key, value), strict=True))

    @property
    def _lengths(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        return self.queries.cu_seqlens, self.keys.cu_seqlens, self.queries.max_seqlen, self.keys.max_seqlen


def flash_kernel_takes(query: torch.Tensor) -> bool:
    """Return whether the CUDA flash kernel can run on ``query`` [T, H, C]."""
    head_dim = query.size(2)
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results of ``dtype`` are summed, which is float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partials(
    output: torch.Tensor, lse: torch.Tensor, other_output: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention to the union of two disjoint sets of keys.

    Args:
        output: Attention to the first keys [..., C].
        lse: Log-sum-exp of its scores [...]. Minus infinity where a query has seen no key yet.
        other_output: Attention to the other keys [..., C].
        other_lse: Finite.
    """
    merged_lse = torch.logaddexp(lse, other_lse)
    kept, added = ((part - merged_lse).exp().unsqueeze(-1) for part in (lse, other_lse))
    return output * kept + other_output * added, merged_lse


def tiled_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [B, H, queries, C] and log-sum-exp [B, H, queries] in plain torch, never with all scores.

    Args:
        query: [B, H, queries, C].
        key: [B, K, keys, C] with K dividing H.
        value: As ``key``.
        causal: Whether query i sees keys 0 to i only; there are then as many keys as queries.
        scale: Factor on the scores.
    """
    dtype = accumulation_dtype(query.dtype)
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    output = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:3], -math.inf, dtype=dtype, device=query.device)
    for batch, q, k in _tiles(query.size(0), query.size(2), key.size(2), causal):
        scores = _tile_scores(query[batch, :, q], key[batch, :, k], causal and q == k, scale)
        tile_lse = scores.logsumexp(-1)
        tile_output = (scores - tile_lse.unsqueeze(-1)).exp() @ value[batch, :, k].to(dtype)
        output[batch, :, q], lse[batch, :, q] = merge_partials(
            output[batch, :, q], lse[batch, :, q], tile_output, tile_lse
        )
    return output.to(query.dtype), lse


def tiled_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> Gradients:
    """Return the gradients of query, key and value. Arguments and shapes are those of ``tiled_forward``."""
    dtype = accumulation_dtype(query.dtype)
    group = query.size(1) // key.size(1)
    key_shape = key.shape
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    row_sums = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
    for batch, q, k in _tiles(query.size(0), query.size(2), key.size(2), causal):
        scores = _tile_scores(query[batch, :, q], key[batch, :, k], causal and q == k, scale)
        weights = (scores - lse[batch, :, q].unsqueeze(-1)).exp()
        tile_grad = grad_output[batch, :, q].to(dtype)
        grad_weights = tile_grad @ value[batch, :, k].to(dtype).transpose(-1, -2)
        grad_scores = weights * (grad_weights - row_sums[batch, :, q]) * scale
        gradients[0][batch, :, q] += grad_scores @ key[batch, :, k].to(dtype)
        gradients[1][batch, :, k] += grad_scores.transpose(-1, -2) @ query[batch, :, q].to(dtype)
        gradients[2][batch, :, k] += weights.transpose(-1, -2) @ tile_grad
    grad_key, grad_value = (x.view(*key_shape[:2], group, *key_shape[2:]).sum(2) for x in gradients[1:])
    return gradients[0].to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


@contextlib.contextmanager
def _repeatable_sums_if_asked() -> Iterator[None]:
    """Have the flash kernel add up the gradient of the queries in one order where torch is asked for determinism.

    The kernel does so only where torch makes an error of what cannot be repeated. Where it only warns of it, as in
    training here, the kernel would warn too and go on with sums in the order in which its blocks arrive.
    """
    if torch.get_deterministic_debug_mode() != _WARN:
        yield
        return
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(_WARN)


def _heads_first(spans: torch.Tensor) -> torch.Tensor:
    """Return [B, H, length, C] from [B, length, H, C]."""
    return _dense(spans).transpose(1, 2)


def _dense(rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows`` dense in the last dim. The CUDA kernel refuses others, the CPU kernel silently misreads them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tiles(batch: int, queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Yield (batch, query, key) slices whose scores have a bounded number of rows. None lies above the diagonal."""
    batch_step = max(1, _TILE // queries)
    for b in range(0, batch, batch_step):
        for q in range(0, queries, _TILE):
            for k in range(0, q + 1 if causal else keys, _TILE):
                yield slice(b, b + batch_step), slice(q, q + _TILE), slice(k, k + _TILE)


def _tile_scores(query: torch.Tensor, key: torch.Tensor, diagonal: bool, scale: float) -> torch.Tensor:
    """Return scaled scores in the accumulation dtype, minus infinity above the diagonal of a diagonal tile."""
    dtype = accumulation_dtype(query.dtype)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if diagonal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(hidden, -math.inf)
    return scores
