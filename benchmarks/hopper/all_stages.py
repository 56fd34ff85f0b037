"""What ``python -m benchmarks.hopper`` does without ``--quick``: run the stages, print a table, write the card."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.hopper.bench import Stage
from benchmarks.hopper.card import read_reports, write_card
from benchmarks.hopper.machine import check_device
from benchmarks.hopper.records import Row, Verdict, line
from benchmarks.hopper.runner import ROOT, run_stages
from benchmarks.hopper.stages import STAGES
from nemo_prolong.errors import ConfigError

CARD = ROOT / "docs" / "verification" / "hopper.json"


def chosen_stages(text: str) -> list[Stage]:
    """Return the stages of a list of names such as ``attention,loss_head``.

    Raises:
        ConfigError: If a name is no stage.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES:
            raise ConfigError(
                f"--stages {text}", f"{name!r} is no stage; there are {', '.join(STAGES)}.", "Name some of these."
            )
    return [STAGES[name] for name in names]


def show(stage: Stage, report: dict[str, Any]) -> None:
    """Print the table of a stage."""
    rows = [Row.from_json(row) for row in report["rows"]]
    print(f"{stage.title} ({stage.name})", *map(line, rows), sep="\n", flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages and return the exit code: 1 if something failed or missed its bound.

    Raises:
        ConfigError: If there is no such stage or no such device.
    """
    stages = chosen_stages(arguments.stages or ",".join(STAGES))
    check_device(arguments.device)
    path = arguments.json or (CARD if arguments.device != "cpu" else None)
    card = read_reports(path) if path is not None else {}

    def done(stage: Stage, report: dict[str, Any]) -> None:
        show(stage, report)
        card[stage.name] = report
        if path is not None:
            write_card(path, {name: card[name] for name in STAGES if name in card})

    flag = "" if arguments.device != "cpu" else " --device cpu"
    command = f"python -m benchmarks.hopper{flag} --stages "
    reports = run_stages(stages, arguments.device, lambda stage: command + stage.name, done)
    if path is not None:
        print(f"card: {path.with_suffix('.md')}")
    results = [row["result"] for report in reports.values() for row in report["rows"]]
    return int(Verdict.FAILED in results or Verdict.MISSED in results)
