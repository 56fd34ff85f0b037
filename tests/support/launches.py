"""Programs of these tests in processes of their own: training on one rank and on several."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.support.module_server import ModuleServer

TWO_RANK_LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "cp2": {"context_parallel_size": 2},
    "cp2_all_gather": {"context_parallel_size": 2, "cp_comm_type": "all_gather"},
    "cp2_a2a": {"context_parallel_size": 2, "cp_comm_type": "a2a"},
}
PROGRAM = "tests.support.train_program"


_SERVER = ModuleServer()


def run_module(module: str, *arguments: str, timeout_seconds: float = 300, cwd: Path | None = None) -> str:
    """Run a program of these tests that imports NeMo, and return its output; a failure shows all of it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return _output(_SERVER.run([module, *arguments], environment, timeout_seconds, cwd))


def run_program(command: list[str], timeout_seconds: float = 300, cwd: Path | None = None, **environment: str) -> str:
    """Run a program in a process of its own and return its output; a failure shows all of it."""
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        cwd=cwd,
    )
    return _output(result)


def _output(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def job(config: Any, resume: Path | None = None, parent_checkpoint: Path | None = None) -> dict[str, Any]:
    """Describe one stage for the training program."""
    return {
        "config": config.model_dump(mode="json"),
        "resume": str(resume) if resume else None,
        "parent_checkpoint": str(parent_checkpoint) if parent_checkpoint else None,
    }


def train(jobs: list[dict[str, Any]], directory: Path, ranks: int = 1) -> None:
    """Train the jobs in one process, or each on ``ranks`` forks of one."""
    path = directory / f"jobs_{ranks}.json"
    path.write_text(json.dumps(jobs))
    forks = [] if ranks == 1 else [str(ranks)]
    run_module(PROGRAM, str(path), *forks, timeout_seconds=600)
