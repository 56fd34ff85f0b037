"""Every selected layout trained once per session; the tests look at what the runs left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launches import run_module
from tests.support.layouts import LAYOUTS, ONE_RANK, RECOMPUTED, STEPS, stage_config, write_rows

PROGRAM = "tests.layouts.layout_program"


class Runs:
    """Where the runs of the layouts are.

    Attributes:
        directory: Parent of the run directories and of ``data/``.
        names: Layouts that were run; the checkpoint that a layout reloaded is that of the one before it.
    """

    def __init__(self, directory: Path, names: list[str]) -> None:
        self.directory = directory
        self.names = names

    @property
    def start(self) -> Path:
        """The checkpoint that every run starts from."""
        return self.directory / "start" / "checkpoints" / "step_00000002"

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        """Weights of a run after a step."""
        return self.directory / name / "checkpoints" / f"step_{step:08d}"

    def job(self, name: str, layout: dict[str, Any], suffix: str = "", reload: Path | None = None) -> dict[str, Any]:
        """Describe a run for the program."""
        steps = {} if reload is None else {"train": {"train_iters": STEPS + 1}}
        cfg = stage_config(
            self.directory / "data", self.directory, name + suffix, parallelism=layout["parallelism"], **steps
        )
        return {
            "config": cfg.model_dump(mode="json"),
            "ranks": layout["ranks"],
            "parent": str(self.start),
            "reload": reload and str(reload),
            "log": str(self.directory / f"{name}{suffix}"),
        }

    def reloaded_from(self, name: str) -> str:
        """Return the layout whose checkpoint this one reloaded."""
        return self.names[self.names.index(name) - 1]


def _start(runs: Runs) -> dict[str, Any]:
    """Describe the run whose weights all others start from."""
    job = runs.job("start", {"ranks": 1, "parallelism": {}})
    job["config"] |= {"transition": "scratch", "parent": None}
    job["config"]["train"]["train_iters"] = 2
    return {**job, "parent": None}


@pytest.fixture(scope="session")
def layout_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One rank and every layout that a selected test names, trained from the same weights."""
    selected = {item.callspec.params.get("layout") for item in request.session.items if hasattr(item, "callspec")}
    runs = Runs(tmp_path_factory.mktemp("layouts"), [ONE_RANK, *(name for name in LAYOUTS if name in selected)])
    write_rows(runs.directory / "data")
    layouts = {ONE_RANK: {"ranks": 1, "parallelism": {}}, **LAYOUTS}
    jobs = [_start(runs), *(runs.job(name, layouts[name]) for name in runs.names)]
    jobs += [
        runs.job(name, layouts[name], "_reloads", runs.checkpoint(runs.reloaded_from(name))) for name in runs.names
    ]
    per_device = runs.job("per_device", LAYOUTS["dp2"])
    per_device["config"]["train"] |= {"train_iters": 1, "loss_average": "per_device"}
    jobs.append(per_device)
    for name, recompute in RECOMPUTED.items():
        recomputed = runs.job(name, layouts[ONE_RANK])
        recomputed["config"]["precision"]["recompute"] |= recompute
        jobs.append(recomputed)
    path = runs.directory / "jobs.json"
    path.write_text(json.dumps(jobs))
    run_module(PROGRAM, str(path), timeout_seconds=180 * len(runs.names))
    return runs
