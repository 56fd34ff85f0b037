"""What a stage says: one row for each thing it looked at. Needs no torch."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What came of a row."""

    MET = "met"
    MISSED = "missed"
    MEASURED = "measured"
    NOT_RUN = "not run"
    FAILED = "failed"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        bar: What it is.
        result: What came of it.
        ours: The figure, where there is one.
        unit: Its unit.
        relation: ``at most`` or ``at least`` where there is a bound.
        bound: The bound.
        peer: What the figure is compared with, in the same unit.
        note: The reason where nothing was measured; else what a reader needs to know.
    """

    bar: str
    result: Verdict
    ours: float | None = None
    unit: str = ""
    relation: str = ""
    bound: float | None = None
    peer: float | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the record in the form of every benchmark here; ``met`` is null where there is no bound.

        JSON has no infinity and no word for what is not a number: such a figure is null, and the note says it.
        """
        fields = asdict(self)
        if self.ours is not None and not math.isfinite(self.ours):
            fields |= {"ours": None, "note": f"the figure is {self.ours}. {self.note}".strip()}
        ratio = fields["ours"] / self.peer if fields["ours"] is not None and self.peer else None
        met = {Verdict.MET: True, Verdict.MISSED: False}.get(self.result)
        return {**fields, "ratio": ratio, "met": met}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Row:
        """Return the row of a record."""
        fields = {key: value for key, value in record.items() if key not in ("ratio", "met")}
        return cls(**{**fields, "result": Verdict(record["result"])})


def at_most(bar: str, ours: float, bound: float, unit: str = "", *, peer: float | None = None, note: str = "") -> Row:
    """Return a row that is met if the figure is no more than the bound; what is not a number never is."""
    result = Verdict.MET if ours <= bound else Verdict.MISSED
    return Row(bar, result, ours, unit, "at most", bound, peer, note)


def at_least(bar: str, ours: float, bound: float, unit: str = "", *, peer: float | None = None, note: str = "") -> Row:
    """Return a row that is met if the figure is no less than the bound; what is not a number never is."""
    result = Verdict.MET if ours >= bound else Verdict.MISSED
    return Row(bar, result, ours, unit, "at least", bound, peer, note)


def holds(bar: str, true: bool, note: str = "") -> Row:
    """Return a row that is met if something is so."""
    return Row(bar, Verdict.MET if true else Verdict.MISSED, note=note)


def measured(bar: str, ours: float, unit: str, *, peer: float | None = None, note: str = "") -> Row:
    """Return a figure without a bound."""
    return Row(bar, Verdict.MEASURED, ours, unit, peer=peer, note=note)


def not_run(bar: str, reason: str) -> Row:
    """Return a row that says why there is no figure."""
    return Row(bar, Verdict.NOT_RUN, note=reason)


def failed(bar: str, reason: str) -> Row:
    """Return a row for what broke."""
    return Row(bar, Verdict.FAILED, note=reason)


def attempt(bar: str, part: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a part of a stage; if it raises, a row that says so, and the stage goes on.

    Args:
        bar: What to call the part if it fails.
        part: Yields rows.
    """
    try:
        yield from part()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        message = (str(error).strip().splitlines() or [""])[0]
        yield failed(bar, f"{type(error).__name__}: {message}")


def figure(value: float | None) -> str:
    """Return a number in as many digits as a reader wants: five thousand steps and 1e-7 alike.

    >>> figure(None), figure(1234567.0), figure(0.4217), figure(3.1e-8), figure(0.0)
    ('', '1,234,567', '0.4217', '3.1e-08', '0')
    """
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line(row: Row) -> str:
    """Return a row as a line of the table on the console."""
    value = f"{figure(row.ours)} {row.unit}".strip()
    bound = f"{row.relation} {figure(row.bound)}" if row.relation else ""
    note = f"  {row.note}" if row.note else ""
    return f"  {row.bar:66} {value:>22}  {bound:18} {row.result.upper():8}{note}".rstrip()
