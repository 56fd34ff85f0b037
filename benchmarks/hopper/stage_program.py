"""Run one stage in this process and write what it says, a JSON object a line: the environment, then each row.

    python -m benchmarks.hopper.stage_program STAGE DEVICE FILE

Rows are written as they come, so that those before an error of the device are kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.machine import environment
from benchmarks.hopper.records import attempt, not_run
from benchmarks.hopper.stages import STAGES


def write_stage(stage: Stage, device: torch.device, file: TextIO) -> None:
    """Write the environment and the rows of a stage."""

    def write(record: dict[str, Any]) -> None:
        file.write(json.dumps(record) + "\n")
        file.flush()

    write(environment(device))
    if missing := stage.missing():
        write(not_run(stage.title, f"{', '.join(missing)} is not installed.").as_json())
        return
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        bench = Bench(device, Path(scratch))
        for row in attempt(stage.title, lambda: stage.run(bench)):
            write(row.as_json())


def main() -> None:
    """Read the command line."""
    name, device, path = sys.argv[1:]
    # Images of NVIDIA let torch multiply fp32 matrices in TF32.
    torch.set_float32_matmul_precision("highest")
    with Path(path).open("w") as file:
        write_stage(STAGES[name], torch.device(device), file)


if __name__ == "__main__":
    main()
