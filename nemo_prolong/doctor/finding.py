"""What the doctor says: one finding for each thing that was looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from nemo_prolong.errors import ProlongError


class Level(StrEnum):
    """How much a finding matters. Only ``NO_GO`` changes the exit code."""

    OK = "ok"
    WARNING = "warning"
    NO_GO = "no_go"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, for programs, such as ``shared_memory``.
        level: How much it matters.
        what: What was found, one sentence.
        why: Why it matters here. Empty where all is well.
        remedy: What to do about it. Empty where all is well.
        nodes: Hosts that found it. Empty where the doctor looked at one machine.
    """

    name: str
    level: Level
    what: str
    why: str = ""
    remedy: str = ""
    nodes: tuple[str, ...] = ()


def good(name: str, what: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(name, Level.OK, what)


def warning(name: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding that costs something and stops nothing."""
    return Finding(name, Level.WARNING, what, why, remedy)


def no_go(name: str, what: str, why: str, remedy: str) -> Finding:
    """Return a finding that the stage would die of, now or later."""
    return Finding(name, Level.NO_GO, what, why, remedy)


def refused(name: str, error: ProlongError) -> Finding:
    """Return an error that the stage would be refused with, as a finding."""
    return no_go(name, f"{error.what}: {error.rule}", "scripts/train.py ends with the same words.", error.remedy)


def is_go(findings: Iterable[Finding]) -> bool:
    """Return whether nothing that was found stops the stage."""
    return all(finding.level is not Level.NO_GO for finding in findings)
