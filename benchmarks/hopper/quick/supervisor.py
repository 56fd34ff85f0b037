"""Run the cases within a time, whatever becomes of the process that runs them. Needs no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.hopper.quick.case import Case
from benchmarks.hopper.quick.process import Worker
from benchmarks.hopper.records import Row, Verdict, failed, not_run

START_SECONDS = 25.0
"""Time that a new process takes to import everything, once it has been done on this machine."""

_START_LIMIT_SECONDS = 120.0
_ENDING_SECONDS = 3.0
_LOG_LINES = 40
_REFUSED_STATUS = 2

Report = dict[str, Any]


class Refused(Exception):
    """The process says that nothing can be measured here, and why."""


class Budget:
    """Time that may be used.

    Args:
        seconds: From now on.
        clock: Returns seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._ends = clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._ends - self._clock()


class Supervisor:
    """Has one process run case after case; where it ends or hangs, another one runs the rest.

    Args:
        program: Starts the process.
        budget: Time of all cases; what does not fit any more is not started.
        log: What the process prints.
        changed: Called with the report of a case after every row, with that row, and at its end without one.
        command_of: Returns what to type to run a case again.
    """

    def __init__(
        self,
        program: list[str],
        budget: Budget,
        log: Path,
        changed: Callable[[Case, Report, Row | None], None],
        command_of: Callable[[Case], str],
    ) -> None:
        self._program, self._budget, self._log = program, budget, log
        self._changed, self._command_of = changed, command_of
        self._worker: Worker | None = None
        self._about: dict[str, Any] = {}
        self._broken: set[str] = set()
        self._case_started = 0.0
        self._log_read_bytes = 0

    def run(self, cases: Iterable[Case]) -> None:
        """Run the cases; interrupted, say so of those that are left.

        Raises:
            Refused: If nothing can be measured here.
        """
        interrupted = False
        try:
            for case in cases:
                report = self._new_report(case)
                try:
                    reason = "asked to stop before it." if interrupted else self._reason_to_leave_out(case)
                    if reason:
                        self._add(case, report, not_run(case.title, reason))
                    else:
                        self._run_case(case, report)
                except KeyboardInterrupt:
                    interrupted = True
                    self._abandon(case, report)
                    self._add(case, report, failed(case.title, "asked to stop; what it had shown by then is above."))
        finally:
            self._stop()

    def _reason_to_leave_out(self, case: Case) -> str:
        if case.after in self._broken:
            return f"the case {case.after} failed."
        needed = case.planned_seconds + (0.0 if self._worker else START_SECONDS)
        left = self._budget.left() - _ENDING_SECONDS
        if needed <= left:
            return ""
        return f"it takes about {needed:.0f} s, and {max(left, 0):.0f} s of {self._budget.seconds:.0f} s were left."

    def _run_case(self, case: Case, report: Report) -> None:
        limit = case.limit_seconds
        if self._worker is None:
            # Imports of the engine are in its first case.
            limit += START_SECONDS
            if complaint := self._start():
                self._finish(case, report, complaint)
                return
        assert self._worker is not None
        self._worker.ask(case.name)
        self._finish(case, report, self._listen(case, report, time.monotonic() + limit))

    def _start(self) -> str:
        """Start a process and return what went wrong, or nothing.

        Raises:
            Refused: If it says that nothing can be measured here.
        """
        self._worker = Worker(self._program, self._log)
        seconds = min(_START_LIMIT_SECONDS, self._budget.left())
        try:
            about = self._worker.answer(seconds)
        except TimeoutError:
            self._stop()
            return f"the process did not start within {seconds:.0f} s{self._last_words()}"
        if about is not None:
            self._about = about
            return ""
        status = self._ended()
        if status == _REFUSED_STATUS:
            raise Refused("\n".join(self._log_lines()[-1:]))
        return f"the process ended with status {status}{self._last_words()}"

    def _listen(self, case: Case, report: Report, ends: float) -> str:
        """Add what the process says of a case, and return what went wrong, or nothing."""
        assert self._worker is not None
        started = time.monotonic()
        report |= self._about
        while True:
            try:
                answer = self._worker.answer(min(ends - time.monotonic(), self._budget.left()))
            except TimeoutError:
                self._abandon(case, report)
                whole = ", when the time of the check was out" if self._budget.left() <= 0 else ""
                return f"stopped after {time.monotonic() - started:.0f} s{whole}{self._last_words()}"
            if answer is None:
                return f"the process ended with status {self._ended()}{self._last_words()}"
            if "row" in answer:
                self._add(case, report, Row.from_json(answer["row"]))
                continue
            if answer["complaint"]:
                print(f"after {case.name}: {answer['complaint']} A new process runs the next case.", file=sys.stderr)
                self._stop()
            return ""

    def _finish(self, case: Case, report: Report, complaint: str) -> None:
        if complaint:
            self._add(case, report, failed(case.title, complaint))
        self._stamp(case, report)
        if any(row["result"] == Verdict.FAILED for row in report["rows"]):
            self._broken.add(case.name)
            tail = self._log_lines()[-_LOG_LINES:]
            print("\n".join(["", f"end of the log of case {case.name}:", *tail]), file=sys.stderr, flush=True)

    def _new_report(self, case: Case) -> Report:
        about = {"title": case.title, "shows": case.shows, "command": self._command_of(case)}
        started = {"finished_at": "", "seconds": 0.0, "planned_seconds": case.planned_seconds}
        self._case_started = time.monotonic()
        self._log_read_bytes = self._log.stat().st_size if self._log.exists() else 0
        return {**about, **started, **self._about, "rows": []}

    def _add(self, case: Case, report: Report, row: Row) -> None:
        report["rows"].append(row.as_json())
        self._stamp(case, report, row)

    def _stamp(self, case: Case, report: Report, row: Row | None = None) -> None:
        report["seconds"] = round(time.monotonic() - self._case_started, 1)
        report["finished_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._changed(case, report, row)

    def _stop(self) -> None:
        """End the process if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _abandon(self, case: Case, report: Report) -> None:
        """End the process, and add the rows that it had written by then."""
        worker = self._worker
        self._stop()
        for answer in worker.rest() if worker is not None else []:
            if "row" in answer:
                self._add(case, report, Row.from_json(answer["row"]))

    def _ended(self) -> int:
        """Return the exit status of the process, which says no more."""
        worker, self._worker = self._worker, None
        assert worker is not None
        return worker.status()

    def _last_words(self) -> str:
        """Return the last line of the log, to be put after a reason."""
        lines = self._log_lines()
        return f"; the last line of its log: {lines[-1]}" if lines else "."

    def _log_lines(self) -> list[str]:
        """Return what was printed since the case began."""
        printed = self._log.read_bytes()[self._log_read_bytes :] if self._log.exists() else b""
        return [line for line in printed.decode(errors="replace").splitlines() if line.strip()]
