"""Reading a machine whose parts may hang: a broken driver, a file system that does not answer.

Every reading runs on a thread of its own, and nobody waits for it beyond a common deadline. A reading that is late is a
finding, and so is one that fails.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nemo_prolong.doctor.finding import Finding, no_go, warning

T = TypeVar("T")

BUDGET_SECONDS = 8.0
"""Time from the first reading to the last answer. With the start of Python and the report the doctor stays below 10."""

COMMAND_SECONDS = 6.0
"""Time that a program gets. ``nvidia-smi`` takes up to 3 s on a node whose driver keeps no state."""

_SHOWN_CHARACTERS = 300


class ProbeError(Exception):
    """A program or a file did not give what it should; the text says what it gave instead."""


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What came of a reading.

    Attributes:
        value: The answer, or None where there is none.
        problem: Why there is none, as a finding, or None.
    """

    value: T | None
    problem: Finding | None = None


class Probe(Generic[T]):
    """A reading under way.

    Args:
        name: What is read, as findings name it.
        what: The same in words, for the finding that it gave no answer.
        read: Reads it. It runs on a thread that the end of the process does not wait for.
        vital: Whether a stage cannot do without it. If not, the finding is a warning.
    """

    def __init__(self, name: str, what: str, read: Callable[[], T], vital: bool = True) -> None:
        self.name = name
        self._vital = vital
        self._what = what
        self._read = read
        self._value: T | None = None
        self._error: Exception | None = None
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"probe-{name}", daemon=True)
        self._thread.start()

    @property
    def is_stuck(self) -> bool:
        """Whether it still has not answered."""
        return self._thread.is_alive()

    def result(self, deadline: float) -> Reading[T]:
        """Return the answer, waiting until a time of ``time.monotonic`` at most."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self.is_stuck:
            waited = time.monotonic() - self._started
            return Reading(None, self._problem(f"{self._what} gave no answer within {waited:.0f} s."))
        if self._error is not None:
            return Reading(None, self._problem(f"{self._what} cannot be read ({_said(self._error)})."))
        return Reading(self._value)

    def _run(self) -> None:
        try:
            self._value = self._read()
        except Exception as error:  # whatever is wrong with a machine, the others of its parts are still looked at
            self._error = error

    def _problem(self, what: str) -> Finding:
        remedy = "Look at the driver or the file system of this node (dmesg, mount), or leave the node out."
        if self._vital:
            return no_go(self.name, what, "The stage would hang or fail at the same place.", remedy)
        return warning(self.name, what, "What it would show is not looked at.", remedy)


def run_command(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> str | None:
    """Return what a program prints, or None where it does not exist.

    Args:
        command: Program and arguments.
        seconds: Time after which it is killed.

    Raises:
        ProbeError: If it fails, or takes longer.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise ProbeError(f"{command[0]} did not end within {seconds:g} s") from None
    if done.returncode != 0:
        # The reason is at the end: a traceback, say, has it there.
        words = " ".join((done.stdout + done.stderr).split())[-_SHOWN_CHARACTERS:]
        raise ProbeError(f"{command[0]} ended with {done.returncode}: {words}")
    return done.stdout


def values(probes: Sequence[Probe[Any]], deadline: float) -> tuple[dict[str, Any], list[Finding]]:
    """Return the answers of probes by their names, and a finding for each that gave none."""
    readings = {probe.name: probe.result(deadline) for probe in probes}
    problems = [reading.problem for reading in readings.values() if reading.problem is not None]
    return {name: reading.value for name, reading in readings.items()}, problems


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS].rstrip(".") or type(error).__name__
