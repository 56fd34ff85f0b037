"""Attention alone, by three kernels, with the heads of a rank: the rates that a plan of a run is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from benchmarks.hopper.attention import Attention, alone_by, boundaries, causal_flops, random_row, with_gradients
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.measure import median_seconds, release
from benchmarks.hopper.quick.measure import documents_of, repeats
from benchmarks.hopper.quick.te import kernel_of_last_call, packed_call, te_precision
from benchmarks.hopper.records import Row, attempt, measured, not_run
from benchmarks.hopper.transformer_engine import core_attention
from nemo_prolong.ops.attention import document_attention

_FEW_DOCUMENTS = 8

Kernel = Callable[[Sequence[int]], Attention]


def random_lengths(tokens: int, documents: int, seed: int = 0) -> list[int]:
    """Return the lengths of so many documents that fill a row, cut at random places.

    >>> sum(random_lengths(100, 7)), len(random_lengths(100, 7)), min(random_lengths(100, 100))
    (100, 7, 1)
    """
    cuts = np.random.default_rng(seed).choice(np.arange(1, tokens), documents - 1, replace=False)
    return [int(length) for length in np.diff(np.sort([0, *cuts, tokens]))]


def _documents(bench: Bench) -> list[list[int]]:
    tokens = bench.sized(65_536, 128)
    many = [random_lengths(tokens, bench.sized(*counts)) for counts in ((300, 12), (700, 20))]
    return [[tokens], [tokens // 8] * 8, *many]


def _tensor_parallel_sizes(bench: Bench) -> tuple[int, ...]:
    return (1, 4, 8) if bench.full else (1, 2)


def _rows(
    bench: Bench,
    name: str,
    ranks: int,
    kernel: Kernel,
    said: Callable[[], str],
    most_documents: int | None = None,
) -> Iterator[Row]:
    """Time every row of documents with the heads of one tensor-parallel rank.

    Args:
        bench: Where.
        name: What runs the attention.
        ranks: Tensor-parallel ranks that share the heads.
        kernel: Returns the attention of a row of documents.
        said: Returns which kernel ran.
        most_documents: Rows of more are left out.
    """
    for lengths in _documents(bench):
        if most_documents is not None and len(lengths) > most_documents:
            continue
        inputs, gradient = random_row(bench, lengths, torch.bfloat16, tensor_parallel_size=ranks)
        bar = f"{name}, {inputs[0].size(1)} heads, {documents_of(lengths)}"
        yield from attempt(bar, functools.partial(_times, bench, bar, ranks, lengths, kernel, inputs, gradient, said))


def _times(
    bench: Bench,
    bar: str,
    ranks: int,
    lengths: Sequence[int],
    kernel: Kernel,
    inputs: list[torch.Tensor],
    gradient: torch.Tensor,
    said: Callable[[], str],
) -> Iterator[Row]:
    attention = kernel(lengths)
    sides = {
        "both": functools.partial(with_gradients, attention, inputs, gradient),
        "forward": functools.partial(attention, *inputs),
    }
    seconds = median_seconds(bench.device, sides, repeats=repeats(bench))
    rate = causal_flops(bench, lengths, ranks) / seconds["both"]
    both, forward = (f"{seconds[side] * 1e3:.4g} ms" for side in ("both", "forward"))
    note = f"{both} forward and backward, {forward} forward; {sum(lengths):,} tokens; {said()}"
    yield measured(bar, rate / 1e12, "TFLOPS", note=note)


def te_rows(bench: Bench) -> Iterator[Row]:
    """Time the attention of the Transformer Engine backend, as a layer calls it."""
    for ranks in _tensor_parallel_sizes(bench):
        release(bench.device)
        tokens = sum(_documents(bench)[0])
        module = core_attention(bench, te_precision(bench), tokens, ranks)
        yield from _rows(
            bench,
            "Transformer Engine",
            ranks,
            functools.partial(packed_call, module),
            lambda: kernel_of_last_call(bench),
        )


def torch_rows(bench: Bench) -> Iterator[Row]:
    """Time the attention of the torch backend, as a layer calls it."""

    def kernel(lengths: Sequence[int]) -> Attention:
        # Boundaries are on the device before the clock starts, as in a layer.
        bounds, longest = boundaries(lengths, bench.device), max(lengths)
        return lambda query, key, value: document_attention(query, key, value, bounds, max_seqlen=longest)

    for ranks in _tensor_parallel_sizes(bench):
        yield from _rows(bench, "torch backend", ranks, kernel, lambda: "torch's flash kernel")


def cudnn_rows(bench: Bench) -> Iterator[Row]:
    """Time cuDNN's kernel through torch, called for each document, where there are few; torch's own on a CPU."""
    name, said = "cuDNN through torch", "one call a document"
    kernel = SDPBackend.CUDNN_ATTENTION
    if not bench.full:
        kernel, said = SDPBackend.FLASH_ATTENTION, f"{said}; torch's own kernel stands in for cuDNN's on a CPU"
    for ranks in _tensor_parallel_sizes(bench):
        attention = functools.partial(functools.partial, alone_by, kernel)
        yield from _rows(bench, name, ranks, attention, lambda: said, _FEW_DOCUMENTS)
    yield not_run(f"{name}, short documents", "it takes one document a call and plans for every new length.")
