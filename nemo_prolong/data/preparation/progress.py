"""How far the preparation is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

from nemo_prolong.units import format_seconds, format_tokens

log = logging.getLogger(__name__)

_LINE_SECONDS = 30.0


class Progress:
    """Progress of one step.

    Args:
        title: What is done.
        total: Input bytes or tokens of the step, whichever ``unit`` says.
        unit: What ``total`` counts: ``bytes`` or ``tokens``.
        done: How much of it an earlier run has finished.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._before = done
        self._started = self._last_line = time.monotonic()
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None

    def advance_to(self, num_bytes: int, tokens: int) -> None:
        """Show that this run has done so many input bytes and tokens of the step."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = self._before + (num_bytes if self._unit == "bytes" else tokens)
        rate = f"{format_tokens(int(tokens / seconds))} tokens/s"
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=min(done, self._total), rate=rate)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS and done > self._before:
            self._last_line = time.monotonic()
            left_seconds = seconds * max(self._total - done, 0) / (done - self._before)
            percent = 100 * min(done, self._total) / max(self._total, 1)
            log.info("%s: %.0f%%, %s, %s left", self._title, percent, rate, format_seconds(left_seconds))

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        """Draw a bar while the context is open, where there is a terminal."""
        if not sys.stderr.isatty():
            yield self
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with RichProgress(*columns, console=Console(stderr=True)) as self._rich:
            self._task = self._rich.add_task(self._title, total=max(self._total, 1), completed=self._before, rate="")
            yield self
        self._rich = None
