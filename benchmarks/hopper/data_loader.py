"""The loader of packed rows against what a GPU takes from it."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.layers import LLAMA_3_8B
from benchmarks.hopper.measure import REPEATS, seconds_of
from benchmarks.hopper.megatron import start
from benchmarks.hopper.records import Row, attempt
from benchmarks.hopper.rows import LONG_DOCUMENT_TOKENS, prolong_mix, write_rows
from nemo_prolong.data.dataset import PackedRowDataset, collate_rows
from nemo_prolong.plan.devices import dense_peak_flops_per_second
from nemo_prolong.plan.flops import training_flops
from nemo_prolong.units import format_tokens

_TIMES_FASTER = 10.0
_ROWS = 8


def tokens_per_second_at_peak(row_tokens: int) -> float:
    """Return what one H100 would train of Llama-3-8B at its dense bf16 peak, on short documents: more than ever."""
    peak = dense_peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16")
    assert peak is not None
    (short,) = (kind for kind in prolong_mix(row_tokens) if kind.name == "short documents")
    return peak / (training_flops(LLAMA_3_8B, short.lengths) / row_tokens)


def run(bench: Bench) -> Iterator[Row]:
    """Load rows of every length of the recipe."""
    start(bench.device)
    for row_tokens in (65_536, 524_288) if bench.full else (65_536,):
        name = f"rows of {format_tokens(row_tokens)}"
        yield from attempt(name, functools.partial(_measure, bench, row_tokens, name))


def _measure(bench: Bench, row_tokens: int, name: str) -> Iterator[Row]:
    root = bench.scratch / f"rows-{row_tokens}"
    kinds = [kind.lengths for kind in prolong_mix(row_tokens, LONG_DOCUMENT_TOKENS)]
    entry = write_rows(root, list(itertools.islice(itertools.cycle(kinds), _ROWS)), LLAMA_3_8B.vocab_size)
    rows = PackedRowDataset(root, [entry], row_tokens, seed=0, num_rows=_ROWS * (REPEATS + 1))
    rate = row_tokens / _seconds_per_row(rows)
    bound = _TIMES_FASTER * tokens_per_second_at_peak(row_tokens)
    note = f"one worker, no other work; the bound is {_TIMES_FASTER:g} times a whole H100 at its peak"
    yield bench.speed_at_least(f"{name}: rate of the loader", rate, bound, "tokens/s", note)
    yield from _step_rows(bench, rows, row_tokens, name)


def _seconds_per_row(rows: PackedRowDataset) -> float:
    """Return the mean time of a row from a loader as training has it, once its worker runs and has read ahead."""
    loader = DataLoader(
        rows, batch_size=1, collate_fn=collate_rows, num_workers=1, multiprocessing_context="forkserver"
    )
    arrivals = [time.perf_counter() for _ in loader]
    return (arrivals[-1] - arrivals[_ROWS - 1]) / (len(arrivals) - _ROWS)


def _step_rows(bench: Bench, rows: PackedRowDataset, row_tokens: int, name: str) -> Iterator[Row]:
    """Yield the time of the data step alone: sizes, the copy to the device."""
    from nemo_prolong.engine.training.packed_step import packed_data_step

    batch = collate_rows([rows[0]])
    seconds = [seconds_of(bench.device, lambda: packed_data_step(iter([batch]))) for _ in range(REPEATS + 1)]
    step_seconds = row_tokens / tokens_per_second_at_peak(row_tokens)
    share = statistics.median(seconds[1:]) / step_seconds
    note = "of the least time that a step on such a row can take on one H100"
    yield bench.speed_at_most(f"{name}: data step and copy, share of a step", share, 0.01, note=note)


STAGE = Stage(
    name="data_loader",
    title="Data loader",
    shows="Rows per second from MDS directories through one worker, as training loads them, against what a whole H100 "
    "could take at its peak; time of the data step with the copy to the device.",
    run=run,
    needs=("nemo", "megatron"),
)
