"""Seconds, bytes, errors and shares of kernels, on a GPU and on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

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
    device: torch.device, sides: Mapping[str, Callable[[], object]], repeats: int = REPEATS
) -> dict[str, float]:
    """Return the median of each side; the runs of all sides are interleaved, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, call in sides.items():
            taken = seconds_of(device, call)
            if repeat:
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
    """Return the same from the allocations and frees that the profiler saw."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


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


def kernel_shares(device: torch.device, call: Callable[[], object]) -> dict[str, float]:
    """Return the share of the time of kernels (operators on a CPU) by kind; they sum to 1."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    totals: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == (device.type == "cuda"):
            totals[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(totals.values())
    return {kind: spent / whole for kind, spent in totals.items()}


def kind_of(kernel: str) -> str:
    """Return what kind of kernel a name is.

    >>> kind_of("flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel"), kind_of("nvjet_tst_128x256"), kind_of("vectorized_add")
    ('attention', 'matrix products', 'the rest')
    """
    name = kernel.lower()
    return next((kind for kind, words in _KERNELS if any(word in name for word in words)), "the rest")
