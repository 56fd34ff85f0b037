"""Whether attention runs under ``train.deterministic`` at the size of a rank of stage 1, and in which memory."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from benchmarks.hopper.attention import Attention, ours, random_row, repeatable, with_gradients
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.measure import median_seconds, peak_bytes
from benchmarks.hopper.quick.measure import documents_of, first_line, repeats
from benchmarks.hopper.quick.te import kernel_of_last_call, only_kernel, packed_call, te_precision
from benchmarks.hopper.records import Row, Verdict, attempt, measured, not_run
from benchmarks.hopper.rows import short_documents
from benchmarks.hopper.transformer_engine import core_attention

# Stage 1: rows of 64K over 2 context-parallel ranks, 32 heads over 4 tensor-parallel ones.
_TENSOR_PARALLEL_SIZE = 4
_SMALL_TENSOR_PARALLEL_SIZE = 2


def _heads_over(bench: Bench) -> int:
    return bench.sized(_TENSOR_PARALLEL_SIZE, _SMALL_TENSOR_PARALLEL_SIZE)


def _rows(
    bench: Bench, name: str, attention: Callable[[Sequence[int]], Attention], kernel: Callable[[], str]
) -> Iterator[Row]:
    """Yield what came of each row of documents.

    Args:
        bench: Where.
        name: What runs the attention.
        attention: Returns the attention of a row of documents.
        kernel: Returns which kernel ran.
    """
    tokens = bench.sized(32_768, 64)
    for lengths in ([tokens], short_documents(tokens, 0, bench.sized(65_536, 2048))):
        inputs, gradient = random_row(bench, lengths, torch.bfloat16, tensor_parallel_size=_heads_over(bench))
        bar = f"{name}, train.deterministic: {inputs[0].size(1)} heads, {tokens:,} tokens, {documents_of(lengths)}"
        yield from attempt(bar, functools.partial(_outcome, bench, bar, attention(lengths), inputs, gradient, kernel))


def _outcome(
    bench: Bench,
    bar: str,
    attention: Attention,
    inputs: list[torch.Tensor],
    gradient: torch.Tensor,
    kernel: Callable[[], str],
) -> Iterator[Row]:
    """Yield the memory of forward and backward pass, or that there is not enough of it."""
    run = functools.partial(with_gradients, attention, inputs, gradient)
    try:
        with repeatable():
            peak = peak_bytes(bench.device, run)
            same = all(map(torch.equal, run(), run()))
            seconds = median_seconds(bench.device, {"ours": run}, warm=True, repeats=repeats(bench))["ours"]
    except torch.OutOfMemoryError as error:
        yield Row(bar, Verdict.MEASURED, note=f"does not run: {first_line(error)}")
        return
    note = f"runs, {seconds * 1e3:.4g} ms; two runs give {'the same' if same else 'other'} bits; {kernel()}"
    yield measured(bar, peak / 2**30, "GiB", note=note)


def _te_rows(bench: Bench, name: str, only: Literal["cudnn", "flash"]) -> Iterator[Row]:
    # Whether kernels must repeat their bits is asked when the layer is made. Megatron wants every kernel allowed then.
    with repeatable():
        module = core_attention(bench, te_precision(bench), bench.sized(32_768, 64), _heads_over(bench))
    with only_kernel(bench, only):
        yield from _rows(bench, name, functools.partial(packed_call, module), lambda: kernel_of_last_call(bench))


def cudnn_rows(bench: Bench) -> Iterator[Row]:
    """Run Transformer Engine with cuDNN's kernels alone, which it prefers on a Hopper GPU."""
    yield from _te_rows(bench, "Transformer Engine, cuDNN", "cudnn")


def flash_rows(bench: Bench) -> Iterator[Row]:
    """Run Transformer Engine with flash-attn alone."""
    if bench.full and not any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_3"))):
        yield not_run("Transformer Engine, flash-attn", "neither flash_attn nor flash_attn_3 is installed.")
        return
    yield from _te_rows(bench, "Transformer Engine, flash-attn", "flash")


def torch_rows(bench: Bench) -> Iterator[Row]:
    """Run the attention of the torch backend."""
    yield from _rows(
        bench, "torch backend", lambda lengths: functools.partial(ours, lengths, bench.device), lambda: "flash kernel"
    )
