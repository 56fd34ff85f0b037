"""The LM head with its loss at the tokens of a row of stage 1."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.hopper.bench import Bench
from benchmarks.hopper.loss_head import cost_rows
from benchmarks.hopper.quick.measure import repeats
from benchmarks.hopper.records import Row


def rows(bench: Bench) -> Iterator[Row]:
    """Measure memory and time at 64K tokens."""
    yield from cost_rows(bench, bench.sized(65_536, 256), repeats(bench))
