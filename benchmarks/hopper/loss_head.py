"""The LM head with its cross-entropy, in chunks: numbers, time, and memory up to a row of 512K tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.measure import REPEATS, largest_error, median_seconds, peak_bytes, release
from benchmarks.hopper.records import Row, at_most, attempt, not_run
from nemo_prolong.ops.linear_cross_entropy import linear_cross_entropy
from nemo_prolong.units import format_bytes

CHUNK_TOKENS = 2048
_FP32_ERROR = 1e-5
_MEMORY_TOLERANCE = 1.05

Head = Callable[..., torch.Tensor]


class HeadSize(NamedTuple):
    """Sizes of a head."""

    tokens: int
    hidden_size: int
    vocab_size: int
    chunk_tokens: int


def head_inputs(size: HeadSize, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return hidden states, weight, labels and mask; a tenth of the tokens is masked."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    hidden, weight = draw(size.tokens, size.hidden_size), draw(size.vocab_size, size.hidden_size)
    weight /= size.hidden_size**0.5
    labels = torch.randint(0, size.vocab_size, (size.tokens,), generator=generator, device=device)
    mask = (torch.rand(size.tokens, generator=generator, device=device) > 0.1).float()
    return hidden.requires_grad_(), weight.requires_grad_(), labels, mask


def chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Return the masked loss sum, ours."""
    return linear_cross_entropy(hidden, weight, labels, mask, chunk_tokens=chunk_tokens).loss_sum


def all_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the masked loss sum from [T, V] logits."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return (F.cross_entropy(logits, labels, reduction="none") * mask).sum()


def checkpointed(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """Return the masked loss sum from blocks whose logits are made again in the backward pass, as ProLong does."""
    blocks = zip(*(x.split(chunk_tokens) for x in (hidden, labels, mask)), strict=True)
    losses = [checkpoint(all_logits, rows, weight, *targets, use_reentrant=False) for rows, *targets in blocks]
    return torch.stack(losses).sum()


def with_gradients(head: Head, inputs: tuple[torch.Tensor, ...], *arguments: int) -> list[torch.Tensor]:
    """Return the loss sum and the gradients of hidden states and weight."""
    loss = head(*inputs, *arguments)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:2])]


def expected_bytes(size: HeadSize, device_type: str) -> int:
    """Return the memory that forward and backward in bfloat16 add to hidden states and weight.

    Gradients of the hidden states and, in float32, of the weight stay. Beside them are either the logits of a chunk, as
    they come and in float32, or those in bfloat16 and the product that is added to the weight gradient; a CPU adds it
    by way of a copy in float32.
    """
    table = size.vocab_size * size.hidden_size
    logits = min(size.chunk_tokens, size.tokens) * size.vocab_size
    product = 2 * table + (4 * table if device_type == "cpu" else 0)
    return size.tokens * size.hidden_size * 2 + 4 * table + max((2 + 4) * logits, 2 * logits + product)


def _error_rows(bench: Bench) -> Iterator[Row]:
    """Compare loss and gradients with float64."""
    size = HeadSize(*((2048, 4096, 128_256, 512) if bench.full else (96, 32, 500, 20)))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = head_inputs(size, dtype, bench.device)
        exact = (*(x.detach().double().requires_grad_() for x in inputs[:2]), inputs[2], inputs[3].double())
        expected = with_gradients(all_logits, exact)
        error = largest_error(with_gradients(chunked, inputs, size.chunk_tokens), expected)
        name = f"{str(dtype).removeprefix('torch.')}: error of loss and gradients"
        if dtype == torch.float32:
            yield at_most(name, error, _FP32_ERROR)
        else:
            peer = largest_error(with_gradients(all_logits, inputs), expected)
            yield at_most(name, error, 2 * peer, peer=peer, note="the bound is twice the error of all logits at once")


def cost_rows(bench: Bench, tokens: int, repeats: int = REPEATS) -> Iterator[Row]:
    """Measure memory and time of one length, in bfloat16."""
    size = HeadSize(tokens, *((4096, 128_256, CHUNK_TOKENS) if bench.full else (256, 1000, 64)))
    inputs = head_inputs(size, torch.bfloat16, bench.device)
    taken = peak_bytes(bench.device, lambda: with_gradients(chunked, inputs, size.chunk_tokens))
    arithmetic = expected_bytes(size, bench.device.type)
    yield at_most(
        f"{tokens:,} tokens: peak memory over the arithmetic",
        taken / arithmetic,
        _MEMORY_TOLERANCE,
        note=f"{format_bytes(taken)}; all logits at once would take {format_bytes(6 * tokens * size.vocab_size)}",
    )
    sides = {
        "ours": lambda: with_gradients(chunked, inputs, size.chunk_tokens),
        "checkpointed": lambda: with_gradients(checkpointed, inputs, size.chunk_tokens),
    }
    seconds = median_seconds(bench.device, sides, repeats=repeats)
    flops = 6 * size.tokens * size.vocab_size * size.hidden_size
    yield bench.speed_at_most(
        f"{tokens:,} tokens: time over that of checkpointed blocks",
        seconds["ours"] / seconds["checkpointed"],
        1.0,
        note=f"{seconds['ours']:.4g} s, {flops / seconds['ours'] / 1e12:.4g} TFLOPS; three products instead of four",
    )


def run(bench: Bench) -> Iterator[Row]:
    """Yield errors, then memory and time of each length that fits."""
    yield from attempt("errors", lambda: _error_rows(bench))
    for tokens in (65_536, 524_288) if bench.full else (256, 1024):
        release(bench.device)
        needed = 0 if not bench.full else 2 * expected_bytes(HeadSize(tokens, 4096, 128_256, CHUNK_TOKENS), "cuda")
        if bench.full and needed > (free := torch.cuda.mem_get_info(bench.device)[0]):
            reason = f"needs about {format_bytes(needed)}, {format_bytes(free)} are free."
            yield not_run(f"{tokens:,} tokens: memory and time", reason)
        else:
            yield from attempt(f"{tokens:,} tokens: memory and time", functools.partial(cost_rows, bench, tokens))


STAGE = Stage(
    name="loss_head",
    title="Loss head",
    shows="Loss and gradients of the LM head in chunks against float64; peak memory against arithmetic and time "
    "against checkpointed blocks, at 64K and 512K tokens with a vocabulary of 128,256.",
    run=run,
)
