"""``python -m benchmarks.hopper``: run the stages, print a table, write the card."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.hopper.bench import Stage
from benchmarks.hopper.card import read_reports, write_card
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


def check_device(device: str) -> None:
    """Refuse a machine without a GPU.

    Raises:
        ConfigError: If ``device`` is a GPU and torch finds none.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}",
            f"torch {torch.__version__} finds no GPU here.",
            "Run it on an H100 or H200, or add --device cpu for small sizes.",
        )


def show(stage: Stage, report: dict[str, Any]) -> None:
    """Print the table of a stage."""
    rows = [Row.from_json(row) for row in report["rows"]]
    print(f"{stage.title} ({stage.name})", *map(line, rows), sep="\n", flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages and return the exit code: 1 if something failed or missed its bound.

    Raises:
        ConfigError: If there is no such stage or no such device.
    """
    stages = chosen_stages(arguments.stages)
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


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hopper", description="Verify this software on a GPU.")
    parser.add_argument("--stages", default=",".join(STAGES), help="names with commas between them; default: all")
    parser.add_argument("--device", default="cuda:0", choices=("cuda:0", "cpu"), help="cpu runs small sizes")
    parser.add_argument("--json", type=Path, help="card to write or to add to; the page is written beside it")
    try:
        # Asked to end, as by Ctrl-C: the stage that runs is ended, and what it has shown is kept.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(run(parser.parse_args()))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
