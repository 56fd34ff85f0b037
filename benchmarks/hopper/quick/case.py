"""What a case of the quick check is. Needs no torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from benchmarks.hopper.bench import Bench
    from benchmarks.hopper.records import Row

_SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: How it is called on the command line.
        title: What it looks at.
        shows: What it measures, a sentence or two for the card.
        function: Yields the rows. It is named by its module here and its own name, and imported where it runs.
        planned_seconds: Time that it takes on an H200, by arithmetic until one has shown it.
        needs: Modules without which it cannot run.
        needs_on_gpu: Further ones on a GPU. On a CPU torch stands in for them.
        after: A case that must not have failed; none if empty.
    """

    name: str
    title: str
    shows: str
    function: str
    planned_seconds: float
    needs: tuple[str, ...] = ()
    needs_on_gpu: tuple[str, ...] = ()
    after: str = ""

    @property
    def limit_seconds(self) -> float:
        """Time after which it is stopped."""
        return 2 * self.planned_seconds + _SLACK_SECONDS

    def load(self) -> Callable[[Bench], Iterator[Row]]:
        """Return the function, with everything that its module imports."""
        module, name = self.function.split(".")
        function = getattr(importlib.import_module(f"benchmarks.hopper.quick.{module}"), name)
        return cast("Callable[[Bench], Iterator[Row]]", function)

    def missing(self, *, on_gpu: bool) -> list[str]:
        """Return the modules that are not installed here."""
        needed = (*self.needs, *(self.needs_on_gpu if on_gpu else ()))
        return [name for name in needed if importlib.util.find_spec(name) is None]
