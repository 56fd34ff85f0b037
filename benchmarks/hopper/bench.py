"""What a stage is given and what it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.hopper.records import Row, at_least, at_most, measured, not_run
from nemo_prolong.plan.devices import dense_peak_flops_per_second

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

    def shares_of_peak(
        self, bar: str, flops_per_second: float, bound: float | None, note: str = "", compute: str = "bf16"
    ) -> Iterator[Row]:
        """Yield the share of a dense peak of the device; nothing on a CPU.

        Args:
            bar: Name of the row.
            flops_per_second: What was reached.
            bound: Least share, or None.
            note: For the row.
            compute: Number format whose peak it is.
        """
        if not self.full:
            return
        device = torch.cuda.get_device_name(self.device)
        peak = dense_peak_flops_per_second(device, compute)
        if peak is None:
            yield not_run(bar, f"no {compute} peak is known of {device}.")
        elif bound is None:
            yield measured(bar, flops_per_second / peak, "", note=note)
        else:
            yield at_least(bar, flops_per_second / peak, bound, note=note)


@dataclass(frozen=True)
class Stage:
    """One stage of the check.

    Attributes:
        name: How it is called on the command line; the name of its module.
        title: What it looks at.
        shows: What it measures and against what, a sentence or two for the card.
        run: Yields the rows.
        needs: Modules without which none of it can run.
        limit_seconds: Time after which it is stopped.
    """

    name: str
    title: str
    shows: str
    run: Callable[[Bench], Iterator[Row]]
    needs: tuple[str, ...] = ()
    limit_seconds: float = 600.0

    def missing(self) -> list[str]:
        """Return the modules that are not installed here."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]
