"""Seconds, bytes, errors and times of kernels, on a GPU and on a CPU."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REPEATS = 5

# In this order: the backward pass of attention multiplies matrices too.
_KERNELS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm", "::addmm", "::bmm", "matmul")),
)


def seconds_of(device: torch.device, call: Callable[[], object]) -> float:
    """Return how long one call takes: between CUDA events on a GPU, by the clock on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def median_seconds(
    device: torch.device, sides: Mapping[str, Callable[[], object]], *, warm: bool = False, repeats: int = REPEATS
) -> dict[str, float]:
    """Return the median of the runs of each side; those of all sides are interleaved.

    Args:
        device: Where they run.
        sides: Name -> what to time.
        warm: They have run before; else each runs once more first, which does not count.
        repeats: Runs that count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + (not warm)):
        for name, call in sides.items():
            taken = seconds_of(device, call)
            if repeat or warm:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Return the most memory that a call held at a time, beyond what was held before: tensors alone, no caches."""
    if device.type != "cuda":
        return _cpu_peak_bytes(call)
    release(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak_bytes(call: Callable[[], object]) -> int:
    """Return the same from the allocations and frees that the profiler saw.

    Without oneDNN, which holds copies of matrices in other layouts, as many as the processor's instructions ask for.
    """
    gc.collect()
    with (
        _without_onednn(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def largest_error(actual: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Return the largest difference of two lists of tensors, each relative to the largest entry expected of it."""
    errors = []
    for got, wanted in zip(actual, expected, strict=True):
        wanted = wanted.double()
        errors.append((got.to(wanted.device).double() - wanted).abs().max() / wanted.abs().max())
    # The maximum of tensors keeps what is not a number; Python's may lose it.
    return float(torch.stack(errors).max())


def kernel_seconds(device: torch.device, call: Callable[[], object]) -> dict[str, float]:
    """Return the time of a call's kernels (operators on a CPU) by kind."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    return seconds_by_kind(profiled.key_averages(), on_gpu=on_gpu)


def seconds_by_kind(events: Iterable[Any], *, on_gpu: bool) -> dict[str, float]:
    """Return the time of what the profiler saw by kind.

    Args:
        events: Averages by name.
        on_gpu: Kernels count, else operators. Ranges that a program names, such as a step of an optimizer, are on both
            sides too; what runs inside of them is there besides.
    """
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if (event.device_type == torch.autograd.DeviceType.CUDA) != on_gpu or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        totals[kind_of(event.key)] += microseconds / 1e6
    return dict(totals)


def kind_of(kernel: str) -> str:
    """Return what kind of kernel a name is.

    >>> kind_of("flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel"), kind_of("nvjet_tst_128x256"), kind_of("vectorized_add")
    ('attention', 'matrix products', 'the rest')
    """
    name = kernel.lower()
    return next((kind for kind, words in _KERNELS if any(word in name for word in words)), "the rest")
