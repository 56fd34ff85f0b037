"""What was found, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from nemo_prolong.doctor.facts import Machine
from nemo_prolong.doctor.finding import Finding, Level, is_go
from nemo_prolong.redaction import redact, redact_values
from nemo_prolong.report.terminal.layout import open_console, plain
from nemo_prolong.text import counted

_FORMAT = 1
"""Of the JSON. It changes when a key changes its meaning or goes."""

_PIPED_WIDTH = 120

_LABELS = {Level.NO_GO: ("NO GO", "bold red"), Level.WARNING: ("warning", "yellow"), Level.OK: ("ok", "green")}
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Examination:
    """What the doctor did.

    Attributes:
        subject: What was typed, such as ``+exp=stage2``; empty where the machine alone was looked at.
        machine: What is known of this node.
        findings: What was found, on all nodes.
        seconds: How long it took.
        elsewhere_go: Verdict of rank 0 on the whole job, where this node is another one.
    """

    subject: str
    machine: Machine
    findings: tuple[Finding, ...]
    seconds: float
    elsewhere_go: bool = True

    @property
    def go(self) -> bool:
        """Whether nothing that was found stops the stage."""
        return self.elsewhere_go and is_go(self.findings)


def as_json(examination: Examination) -> str:
    """Return everything as JSON, without secrets."""
    machine = asdict(examination.machine)
    if machine["nvidia"] is not None:
        pairs = machine["nvidia"]["slow_pairs"]
        machine["nvidia"]["slow_pairs"] = [[first, second, way] for (first, second), way in pairs.items()]
    content = {
        "format": _FORMAT,
        "go": examination.go,
        "subject": examination.subject,
        "seconds": round(examination.seconds, 3),
        "findings": [asdict(finding) for finding in examination.findings],
        "machine": machine,
    }
    return json.dumps(redact_values(content), indent=2)


def show(examination: Examination) -> None:
    """Print the findings, the worst first, and the verdict."""
    console = open_console(piped_width=_PIPED_WIDTH)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for level, (label, style) in _LABELS.items():
        for finding in (finding for finding in examination.findings if finding.level is level):
            for number, line in enumerate(_lines(finding)):
                table.add_row(*((plain(label, style), finding.name) if number == 0 else ("", "")), plain(redact(line)))
    _print(console, table, examination)


def verdict(examination: Examination) -> str:
    """Return the last line: go or no go, and why."""
    counts = {level: sum(finding.level is level for finding in examination.findings) for level in Level}
    of = f"{examination.subject} on {examination.machine.host}" if examination.subject else examination.machine.host
    word = "go" if examination.go else "no go"
    reasons = [f"{counted(counts[Level.NO_GO], 'finding')} to mend first"] if not examination.go else []
    reasons.append(counted(counts[Level.WARNING], "warning"))
    return f"{word}: {of}, {', '.join(reasons)} ({examination.seconds:.1f} s)"


def _lines(finding: Finding) -> Iterator[str]:
    nodes = f" [{_named(finding.nodes)}]" if finding.nodes else ""
    yield f"{finding.what}{nodes}"
    if finding.why:
        yield f"why: {finding.why}"
    if finding.remedy:
        yield f"mend: {finding.remedy}"


def _named(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"{', '.join(nodes[:4])}{more}"


def _print(console: Console, table: Table, examination: Examination) -> None:
    console.print(table)
    console.print()
    console.print(plain(redact(verdict(examination)), "bold green" if examination.go else "bold red"), soft_wrap=True)
