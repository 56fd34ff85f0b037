"""What ``python -m benchmarks.hopper --quick`` does. Needs neither torch nor pydantic."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.hopper.card import read_reports
from benchmarks.hopper.quick.card import write_card
from benchmarks.hopper.quick.case import Case
from benchmarks.hopper.quick.cases import CASES
from benchmarks.hopper.quick.supervisor import Budget, Refused, Supervisor
from benchmarks.hopper.records import Row, Verdict, line
from nemo_prolong.errors import ConfigError

ROOT = Path(__file__).parents[3]
CARD = ROOT / "docs" / "verification" / "hopper_quick.json"
SECONDS = 540.0
"""Time of the whole check, so that one command ends within ten minutes."""


def chosen_cases(text: str) -> list[Case]:
    """Return the cases of a list of names such as ``te,te_fp8``, in the order of ``CASES``.

    Raises:
        ConfigError: If a name is no case.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CASES:
            raise ConfigError(
                f"--cases {text}", f"{name!r} is no case; there are {', '.join(CASES)}.", "Name some of these."
            )
    return [case for name, case in CASES.items() if name in names]


def run(arguments: Namespace) -> int:
    """Run the cases and return the exit code: 1 if something failed or missed its bound, 2 without a GPU.

    Raises:
        ConfigError: If there is no such case.
    """
    cases = chosen_cases(arguments.cases or ",".join(CASES))
    path = arguments.json or (CARD if arguments.device != "cpu" else None)
    card = read_reports(path) if path is not None else {}
    reports: dict[str, dict[str, Any]] = {}
    flag = "" if arguments.device != "cpu" else " --device cpu"

    def changed(case: Case, report: dict[str, Any], row: Row | None) -> None:
        if case.name not in reports:
            print(f"{case.title} ({case.name})")
        if row is not None:
            print(line(row), flush=True)
        reports[case.name] = report
        if path is not None:
            whole = {**card, **reports}
            write_card(path, {name: whole[name] for name in CASES if name in whole})

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        program = [sys.executable, "-m", "benchmarks.hopper.quick.worker", arguments.device]
        supervisor = Supervisor(
            program,
            Budget(arguments.seconds or SECONDS),
            Path(directory, "log"),
            changed,
            lambda case: f"python -m benchmarks.hopper{flag} --quick --cases {case.name}",
        )
        try:
            supervisor.run(cases)
        except Refused as refused:
            print(refused, file=sys.stderr)
            return ConfigError.exit_code
    if path is not None:
        print(f"card: {path.with_suffix('.md')}")
    results = [row["result"] for report in reports.values() for row in report["rows"]]
    return int(Verdict.FAILED in results or Verdict.MISSED in results)
