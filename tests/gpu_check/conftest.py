"""The stages that need NeMo run once per session, in one process; the tests look at their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hopper.records import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cpu_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    """Return stage -> bar -> row of what ran on CPU tensors."""
    output = tmp_path_factory.mktemp("gpu_check") / "rows.json"
    command = [sys.executable, "-m", "tests.gpu_check.stages_program", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-6000:]
    stages: dict[str, list[dict[str, Any]]] = json.loads(output.read_text())
    return {stage: {row["bar"]: Row.from_json(row) for row in rows} for stage, rows in stages.items()}
