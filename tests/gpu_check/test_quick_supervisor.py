"""The quick check goes on whatever becomes of the process that measures, within its time."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hopper.quick import case as case_module
from benchmarks.hopper.quick.case import Case
from benchmarks.hopper.quick.supervisor import Budget, Refused, Report, Supervisor
from benchmarks.hopper.records import Row
from tests.gpu_check.quick_program import named

PROGRAM = [sys.executable, "-m", "tests.gpu_check.quick_program"]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def visit(
    tmp_path: Path,
    cases: list[Case],
    budget: Budget | None = None,
    mode: str = "serves",
    changed: Callable[[Case, Report, Row | None], None] = lambda case, report, row: None,
) -> dict[str, Report]:
    """Run cases and return what is reported of each."""
    reports: dict[str, Report] = {}

    def keep(case: Case, report: Report, row: Row | None) -> None:
        reports[case.name] = report
        changed(case, report, row)

    supervisor = Supervisor(
        [*PROGRAM, mode], budget or Budget(60.0), tmp_path / "log", keep, lambda case: f"run {case.name}"
    )
    supervisor.run(cases)
    return reports


def shown(report: Report) -> list[tuple[str, str]]:
    """Return the bar and the result of each row."""
    return [(row["bar"], row["result"]) for row in report["rows"]]


def processes(*reports: Report) -> list[float]:
    """Return the process that measured the first row of each report."""
    return [report["rows"][0]["ours"] for report in reports]


def alive_in_group(group: int) -> list[str]:
    """Return the processes of a group that have not ended."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [state for state, _, process_group, *_ in stats if int(process_group) == group and state != "Z"]


MEASURED = [("first", "measured"), ("second", "measured")]


def test_a_process_that_dies_takes_its_case_along_and_no_other(tmp_path: Path, capfd: Any) -> None:
    reports = visit(tmp_path, [named("fine-1"), named("dies"), named("fine-2"), named("fine-3")])
    assert [shown(reports[name]) for name in ("fine-1", "fine-2", "fine-3")] == [MEASURED] * 3
    died = reports["dies"]
    assert shown(died) == [("first", "measured"), ("Case dies", "failed")]
    assert died["rows"][1]["note"] == "the process ended with status -11; the last line of its log: last words of dies"
    first, before, after, last = processes(*reports.values())
    assert first == before != after == last
    assert died["machine"] == {"device": "NVIDIA H200"} and died["command"] == "run dies"
    error = capfd.readouterr().err
    assert "end of the log of case dies:" in error and "last words of fine-1" not in error


def test_an_exception_is_a_failed_row_and_the_process_goes_on(tmp_path: Path) -> None:
    reports = visit(tmp_path, [named("raises"), named("fine")])
    row = reports["raises"]["rows"][1]
    assert (row["result"], row["note"]) == ("failed", "RuntimeError: CUDA out of memory. Tried to allocate 550.00 GiB.")
    first, second = processes(*reports.values())
    assert first == second and shown(reports["fine"]) == MEASURED


def test_a_process_that_is_not_fit_for_another_case_is_replaced(tmp_path: Path, capfd: Any) -> None:
    reports = visit(tmp_path, [named("sick"), named("fine")])
    first, second = processes(*reports.values())
    assert first != second and [shown(report) for report in reports.values()] == [MEASURED] * 2
    assert "after sick: the device fails. A new process runs the next case." in capfd.readouterr().err


def test_a_case_that_takes_too_long_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_module, "_SLACK_SECONDS", 2.0)
    reports = visit(tmp_path, [named("fine-1"), named("hangs"), named("fine-2")])
    stopped = reports["hangs"]["rows"][1]
    assert stopped["result"] == "failed"
    assert stopped["note"] == "stopped after 2 s; the last line of its log: last words of hangs"
    first, hung, second = processes(*reports.values())
    assert first == hung != second
    assert alive_in_group(int(hung)) == []


def test_what_does_not_fit_into_the_time_is_left_out_and_says_so(tmp_path: Path) -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    cases = [named("fine-1"), replace(named("long"), planned_seconds=80.0), named("fine-2")]

    def pass_time(case: Case, report: Report, row: Row | None) -> None:
        if case.name == "fine-1" and row is None:
            clock.now = 30.0

    reports = visit(tmp_path, cases, budget, changed=pass_time)
    assert [shown(reports[name]) for name in ("fine-1", "fine-2")] == [MEASURED] * 2
    (row,) = reports["long"]["rows"]
    assert (row["result"], row["note"]) == ("not run", "it takes about 80 s, and 67 s of 100 s were left.")


def test_a_start_counts_where_no_process_runs(tmp_path: Path) -> None:
    budget = Budget(25.0, Clock())
    reports = visit(tmp_path, [named("fine")], budget)
    assert reports["fine"]["rows"][0]["note"] == "it takes about 25 s, and 22 s of 25 s were left."


def test_nothing_outlasts_the_time_of_the_check(tmp_path: Path) -> None:
    clock = Clock()

    def pass_time(case: Case, report: Report, row: Row | None) -> None:
        clock.now = 100.0

    reports = visit(tmp_path, [named("hangs"), named("fine")], Budget(99.0, clock), changed=pass_time)
    note = "stopped after 0 s, when the time of the check was out; the last line of its log: last words of hangs"
    assert reports["hangs"]["rows"][1]["note"] == note
    assert reports["fine"]["rows"][0]["note"] == "it takes about 25 s, and 0 s of 99 s were left."


def test_a_case_after_one_that_failed_is_not_run(tmp_path: Path) -> None:
    cases = [named("raises"), replace(named("fine-1"), after="raises"), replace(named("fine-2"), after="fine-1")]
    reports = visit(tmp_path, cases)
    assert reports["fine-1"]["rows"][0]["note"] == "the case raises failed."
    assert shown(reports["fine-2"]) == MEASURED


def test_a_row_is_handed_on_before_the_next_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    bars: list[list[str]] = []

    def changed(case: Case, report: Report, row: Row | None) -> None:
        bars.append([row["bar"] for row in report["rows"]])
        seen.touch()

    visit(tmp_path, [named("waits")], changed=changed)
    assert bars == [["first"], ["first", "second"], ["first", "second"]]


def test_asked_to_stop_it_says_what_was_left(tmp_path: Path) -> None:
    # A shell has what it starts in the background ignore interruptions.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reports = visit(tmp_path, [named("interrupts"), named("fine")])
    finally:
        signal.signal(signal.SIGINT, previous)
    assert shown(reports["interrupts"]) == [("first", "measured"), ("Case interrupts", "failed")]
    assert reports["interrupts"]["rows"][1]["note"] == "asked to stop; what it had shown by then is above."
    assert reports["fine"]["rows"][0]["note"] == "asked to stop before it."


def test_a_machine_that_cannot_measure_ends_the_check(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"^error: no GPU here\.$"):
        visit(tmp_path, [named("fine")], mode="refuses")


def test_a_process_that_cannot_start_says_why_in_every_case(tmp_path: Path) -> None:
    reports = visit(tmp_path, [named("fine-1"), named("fine-2")], mode="fails")
    notes = [report["rows"][0]["note"] for report in reports.values()]
    assert notes == ["the process ended with status 1; the last line of its log: ImportError: libcudnn.so"] * 2
