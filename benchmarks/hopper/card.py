"""The verification card: the reports of all stages as JSON, and as a page for people. Needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.hopper.records import Row, figure
from nemo_prolong.files import write_json_atomically, write_text_atomically

Reports = Mapping[str, Mapping[str, Any]]

_HOW = """\
```
make gpu-check                                     # every stage; about 25 minutes on one H100 or H200
make gpu-check GPU_CHECK_ARGS="--stages layers"    # some of them; the others stay as they are on this page
python -m benchmarks.hopper --device cpu           # small sizes on a CPU, to see that the program itself works
```

`make gpu-check` runs `python3` of the image (`GPU_PYTHON=...` names another one) and writes this page and
`hopper.json`. Exit code 0: nothing failed and every bound is met; 1: something is not; 2: there is no GPU. Without NeMo
`attention` and `loss_head` run alone; without Transformer Engine its stage says so. torch, NumPy and pydantic must be
there. The page is written after every stage, and when the command is interrupted; a stage that runs again replaces its
section.
"""

ON_A_CPU = "**This stage ran at small sizes on a CPU: it shows that the program works, and nothing about a GPU.**"

RESULTS = """\
Results **met** and **missed** are against the bound beside them, and measured has none. Not run and **failed** say why.
"""


def read_reports(path: Path) -> dict[str, Any]:
    """Return the reports that a card was made of; none if there is no card."""
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def write_card(path: Path, reports: Reports) -> None:
    """Write ``path`` and, beside it, the page of the same name.

    Args:
        path: A JSON file.
        reports: By name, in the order of the page; what ``runner.run_stages`` returns, or ``read_reports``.
    """
    write_json_atomically(path, {"format": 1, "stages": dict(reports)})
    write_text_atomically(path.with_suffix(".md"), page(reports))


def page(reports: Reports) -> str:
    """Return the page of a card; without reports, one that says so."""
    head = ["# Verification on a Hopper GPU", ""]
    if not reports:
        return "\n".join(
            [*head, "No stage has run on a GPU yet. Anyone who has an H100 or H200 can run them:", "", _HOW]
        )
    parts = [
        *head,
        "Written by the commands below; every stage says what it ran on.",
        "",
        _HOW,
        RESULTS,
        *summary("stage", reports),
    ]
    for name, report in reports.items():
        parts += ["", *section(name, report)]
    return "\n".join(parts) + "\n"


def summary(what: str, reports: Reports) -> list[str]:
    """Return the table of what ran.

    Args:
        what: What one report is of.
        reports: By name.
    """
    lines = [f"| {what} | device | commit | result | seconds |", "| --- | --- | --- | --- | --- |"]
    for name, report in reports.items():
        counted = Counter(row["result"] for row in report["rows"])
        results = ", ".join(f"{count} {result}" for result, count in sorted(counted.items()))
        device, commit = report.get("machine", {}).get("device", ""), report.get("commit", "")
        lines.append(f"| {report['title']} (`{name}`) | {device} | {commit} | {results} | {report['seconds']:g} |")
    return lines


def section(name: str, report: Mapping[str, Any]) -> list[str]:
    """Return the section of one report."""
    versions = ", ".join(f"{package} {version}" for package, version in report.get("versions", {}).items())
    device = ", ".join(f"{key} {value}" for key, value in report.get("machine", {}).items())
    lines = [f"## {report['title']} (`{name}`)", "", report["shows"], ""]
    if "--device cpu" in report["command"]:
        lines += [ON_A_CPU, ""]
    lines += [f"{report['finished_at']}, commit {report.get('commit') or 'unknown'}; {device}; {versions}.", ""]
    lines += ["```", report["command"], "```", ""]
    lines += ["| what | value | bound | result | note |", "| --- | --- | --- | --- | --- |"]
    return lines + [_table_row(Row.from_json(row)) for row in report["rows"]]


def _table_row(row: Row) -> str:
    result = f"**{row.result}**" if row.result in ("met", "missed", "failed") else str(row.result)
    bound = f"{row.relation} {figure(row.bound)}".strip()
    cells = [row.bar, f"{figure(row.ours)} {row.unit}".strip(), bound, result, row.note]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
