"""Document attention on the device, its numbers and its time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.measure import largest_error, median_seconds
from benchmarks.hopper.records import Row, at_most, attempt, holds, measured, not_run
from benchmarks.hopper.rows import short_documents
from nemo_prolong.ops.attention import document_attention

# Relative to the largest entry, against float64. Sixteen-bit formats are compared with what torch makes of them.
_EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_PEAK_SHARE = 0.3
_SLOWER_THAN_ALONE = 1.15

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def random_row(
    bench: Bench, lengths: Sequence[int], dtype: torch.dtype, seed: int = 0, tensor_parallel_size: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return query, key and value as slices of one projection, as a layer hands them over, and a gradient.

    Args:
        bench: Where.
        lengths: Tokens of each document.
        dtype: Of all tensors.
        seed: Of their values.
        tensor_parallel_size: Ranks that share the heads of the model; those of one rank are returned.

    Returns:
        Query [T, H, C], key and value [T, K, C], all leaves, and the gradient of the output [T, H, C].
    """
    heads, groups = (bench.sized(*sizes) // tensor_parallel_size for sizes in ((32, 4), (8, 2)))
    channels = bench.sized(128, 16)
    generator = torch.Generator(bench.device).manual_seed(seed)
    shape = (sum(lengths), 2 * heads + 2 * groups, channels)
    projection = torch.randn(shape, generator=generator, device=bench.device).to(dtype)
    query, key, value, gradient = projection.split([heads, groups, groups, heads], dim=1)
    return [part.detach().requires_grad_() for part in (query, key, value)], gradient


def alone(lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return torch's causal attention of each document alone, [T, H, C]."""
    outputs = []
    for document in zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True):
        batch = [x.transpose(0, 1)[None] for x in document]
        outputs.append(F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def alone_by(
    kernel: SDPBackend, lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return what ``alone`` does, by one of torch's kernels; left to choose, torch takes cuDNN's on a Hopper GPU.

    Raises:
        RuntimeError: If this kernel cannot run here.
    """
    with sdpa_kernel(kernel):
        return alone(lengths, query, key, value)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Ask torch for determinism as training does with ``train.deterministic``."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def dense(lengths: Sequence[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return causal attention of each document alone by its formula, [T, H, C]: all scores, no kernel of attention."""
    group = query.size(1) // key.size(1)
    outputs = []
    for q, k, v in zip(*(x.split(list(lengths)) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhc,khc->hqk", q, k) * q.size(-1) ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khc->qhc", scores.masked_fill(future, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def ours(
    lengths: Sequence[int], device: torch.device, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Return our attention of the packed row, [T, H, C]."""
    return document_attention(query, key, value, boundaries(lengths, device), max_seqlen=max(lengths))


def boundaries(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return document boundaries, int32 [D+1]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def with_gradients(attention: Attention, inputs: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of query, key and value."""
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def _error_rows(bench: Bench) -> Iterator[Row]:
    """Compare output and gradients of rows of random documents with float64, in every number format."""
    tokens = bench.sized(4096, 192)
    packed = [1, *short_documents(tokens - 2, 1, bench.sized(65_536, 2048)), 1]
    rows = {"short documents": packed, "equal documents": [tokens // 4] * 4, "one document": [tokens]}
    for dtype in (*_EXACT, *_SIXTEEN_BIT):
        errors = {name: _errors(bench, lengths, dtype) for name, lengths in rows.items()}
        worst = max(errors, key=lambda name: _excess(errors[name], dtype))
        error, peer = errors[worst]
        name = f"{str(dtype).removeprefix('torch.')}: error of output and gradients"
        if dtype in _EXACT:
            yield at_most(name, error, _EXACT[dtype], note=f"worst of {len(rows)} rows: {worst}")
        else:
            note = f"the bound is twice the error of torch's own attention in this format; worst row: {worst}"
            yield at_most(name, error, 2 * peer, peer=peer, note=note)


def _excess(errors: tuple[float, float], dtype: torch.dtype) -> float:
    """Return how much of its bound an error takes; infinity for what is not a number."""
    error, peer = errors
    taken = error / (_EXACT[dtype] if dtype in _EXACT else 2 * peer)
    return taken if taken == taken else float("inf")


def _errors(bench: Bench, lengths: Sequence[int], dtype: torch.dtype) -> tuple[float, float]:
    """Return our error and that of torch's attention in the same format."""
    inputs, gradient = random_row(bench, lengths, dtype, seed=len(lengths))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(functools.partial(dense, lengths), exact_inputs, gradient.double())
    packed = with_gradients(functools.partial(ours, lengths, bench.device), inputs, gradient)
    peer = with_gradients(functools.partial(alone, lengths), inputs, gradient)
    return largest_error(packed, expected), largest_error(peer, expected)


def _repeated_rows(bench: Bench) -> Iterator[Row]:
    """Look whether two runs give the same bits where training asks for it, and how often they do where it does not."""
    tokens = bench.sized(16_384, 192)
    for name, lengths in (("one document", [tokens]), ("short documents", short_documents(tokens, 1, tokens))):
        inputs, gradient = random_row(bench, lengths, torch.bfloat16)
        run = functools.partial(with_gradients, functools.partial(ours, lengths, bench.device), inputs, gradient)
        with repeatable():
            asked = all(map(torch.equal, run(), run()))
        unasked = all(map(torch.equal, run(), run()))
        note = f"without asking for it: {'the same' if unasked else 'other bits'}"
        yield holds(f"bfloat16, train.deterministic: two runs give the same bits, {name}", asked, note)


def causal_flops(bench: Bench, lengths: Sequence[int], tensor_parallel_size: int = 1) -> float:
    """Return the FLOPs of forward and backward that a causal mask leaves: two and five products of half a square."""
    width = bench.sized(32 * 128, 4 * 16) // tensor_parallel_size
    return 7 * width * float(sum(length * length for length in lengths))


def _time_rows(bench: Bench) -> Iterator[Row]:
    """Time forward and backward in bfloat16 against the FLOPs of the lengths, and against the documents alone."""
    row = bench.sized(65_536, 512)
    mixes = {
        "one document of a row": [row],
        "two rows, one document": [2 * row],
        "eight equal documents": [row // 8] * 8,
        "short documents": short_documents(row, 0, row),
    }
    for name, lengths in mixes.items():
        yield from attempt(f"time, {name}", functools.partial(_times, bench, name, lengths))


def _times(bench: Bench, name: str, lengths: Sequence[int]) -> Iterator[Row]:
    inputs, gradient = random_row(bench, lengths, torch.bfloat16)
    # Boundaries are on the device before the clock starts, as in a layer.
    bounds, longest = boundaries(lengths, bench.device), max(lengths)

    def packed() -> list[torch.Tensor]:
        return with_gradients(lambda q, k, v: document_attention(q, k, v, bounds, max_seqlen=longest), inputs, gradient)

    def deterministic() -> list[torch.Tensor]:
        with repeatable():
            return packed()

    sides = {"ours": packed, "deterministic": deterministic}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        if _runs(kernel, bench):
            attention = functools.partial(alone_by, kernel, lengths)
            sides[kernel.name] = functools.partial(with_gradients, attention, inputs, gradient)
    yield from _time_ratios(bench, name, lengths, median_seconds(bench.device, sides))


def _runs(kernel: SDPBackend, bench: Bench) -> bool:
    """Return whether one of torch's kernels runs here at all."""
    try:
        alone_by(kernel, [64], *random_row(bench, [64], torch.bfloat16)[0])
    except RuntimeError:
        return False
    return True


def _time_ratios(bench: Bench, name: str, lengths: Sequence[int], seconds: dict[str, float]) -> Iterator[Row]:
    """Yield our time over that of torch's kernels, and the rate of causal FLOPs."""
    ours = seconds["ours"]
    size = f"{sum(lengths):,} tokens, {len(lengths):,} documents; {ours * 1e3:.4g} ms"
    flash, cudnn = (seconds.get(kernel.name) for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
    bar = f"{name}: time over that of its documents alone"
    if flash is None:
        yield not_run(bar, "torch's flash kernel does not run here.")
    else:
        note = f"the same kernel, called for each document; {size}, alone {flash * 1e3:.4g} ms"
        yield bench.speed_at_most(bar, ours / flash, _SLOWER_THAN_ALONE, note=note)
    if cudnn is not None:
        note = f"what another kernel would bring: {cudnn * 1e3:.4g} ms, called for each document"
        yield measured(f"{name}: time over that of cuDNN's kernel", ours / cudnn, "", note=note)
    yield measured(f"{name}: time with train.deterministic over that without", seconds["deterministic"] / ours, "")
    rate = causal_flops(bench, lengths) / ours
    yield measured(f"{name}: rate of causal FLOPs", rate / 1e12, "TFLOPS")
    few = len(lengths) <= 8
    note = "" if few else "tiles reach beyond short documents"
    yield from bench.shares_of_peak(f"{name}: share of the dense bf16 peak", rate, _PEAK_SHARE if few else None, note)


def run(bench: Bench) -> Iterator[Row]:
    """Yield errors, then whether results repeat, then times."""
    yield from attempt("errors", lambda: _error_rows(bench))
    yield from attempt("repeated runs", lambda: _repeated_rows(bench))
    yield from _time_rows(bench)


STAGE = Stage(
    name="attention",
    title="Document attention",
    shows="Output and gradients of packed rows against float64 in four number formats; whether two runs give the same "
    "bits; time of forward and backward in bfloat16 against the causal FLOPs of the lengths and against torch's "
    "kernels called for each document alone.",
    run=run,
)
