"""What a stage is given and what it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.hopper.records import Row, at_least, at_most, measured

_NOT_JUDGED = "bounds of speed are for a GPU"


@dataclass(frozen=True)
class Bench:
    """Where a stage runs.

    Attributes:
        device: ``cuda:0`` or ``cpu``.
        scratch: An empty directory that is deleted after the stage.
    """

    device: torch.device
    scratch: Path

    @property
    def full(self) -> bool:
        """Whether sizes are those of the recipe; on a CPU they are small."""
        return self.device.type == "cuda"

    def sized(self, full: int, small: int) -> int:
        """Return the size to use here."""
        return full if self.full else small

    def speed_at_most(self, bar: str, ours: float, bound: float, unit: str = "", note: str = "") -> Row:
        """Return a row with a bound on a GPU, without one on a CPU."""
        if self.full:
            return at_most(bar, ours, bound, unit, note=note)
        return measured(bar, ours, unit, note="; ".join(filter(None, [note, _NOT_JUDGED])))

    def speed_at_least(self, bar: str, ours: float, bound: float, unit: str = "", note: str = "") -> Row:
        """Return a row with a bound on a GPU, without one on a CPU."""
        if self.full:
            return at_least(bar, ours, bound, unit, note=note)
        return measured(bar, ours, unit, note="; ".join(filter(None, [note, _NOT_JUDGED])))


@dataclass(frozen=True)
class Stage:
    """One stage of the check.

    Attributes:
        letter: How it is named on the command line.
        title: What it looks at.
        shows: What it measures and against what, a sentence or two for the card.
        run: Yields the rows.
        needs: Modules without which none of it can run.
        limit_seconds: Time after which it is stopped.
    """

    letter: str
    title: str
    shows: str
    run: Callable[[Bench], Iterator[Row]]
    needs: tuple[str, ...] = ()
    limit_seconds: float = 600.0

    def missing(self) -> list[str]:
        """Return the modules that are not installed here."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]
