"""A run that was killed, and the same command again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import run_program
from tiny import read_metrics

from nemo_prolong.stages.manifest import StageManifest

PROGRAM = Path(__file__).with_name("stage_program.py")


@pytest.fixture(scope="module")
def killed_run(one_rank_runs: Path, make_config: Callable[..., Any]) -> dict[str, Any]:
    """Kill a copy of the run ``whole`` after step 6, two steps behind its checkpoint, and start it again."""
    cfg = make_config(name="killed", train={"train_iters": 8}, checkpoint={"save_interval_steps": 4, "keep_last": 9})
    path = one_rank_runs / "killed.json"
    path.write_text(json.dumps(cfg.model_dump(mode="json")))
    first = subprocess.run([sys.executable, str(PROGRAM), str(path), "6"], capture_output=True, timeout=200)
    run_dir = Path(cfg.run_dir)
    seen = {"status": first.returncode, "steps": len(read_metrics(run_dir)), "first": StageManifest.read(run_dir)}
    run_program([sys.executable, str(PROGRAM), str(path)])
    return {**seen, "run": run_dir, "second": StageManifest.read(run_dir)}


def test_the_first_process_died_of_the_signal_two_steps_after_its_checkpoint(killed_run: dict[str, Any]) -> None:
    assert killed_run["status"] == -signal.SIGKILL
    assert killed_run["steps"] == 6
    assert killed_run["first"].status == "running"


def test_the_same_command_again_gives_every_step_once_and_the_uninterrupted_losses(
    killed_run: dict[str, Any], one_rank_runs: Path
) -> None:
    keys = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "consumed_train_tokens")
    killed, whole = (
        [[record[key] for key in keys] for record in read_metrics(run)]
        for run in (killed_run["run"], one_rank_runs / "whole")
    )
    assert killed == whole


def test_the_manifest_of_the_finished_run_counts_the_whole_stage_once(killed_run: dict[str, Any]) -> None:
    manifest, records = killed_run["second"], read_metrics(killed_run["run"])
    assert manifest.status == "complete" and manifest.step == 8
    assert manifest.started_at == killed_run["first"].started_at
    assert manifest.consumed_train_tokens == sum(record["real_tokens"] for record in records)
    assert manifest.consumed_target_tokens == sum(record["target_tokens"] for record in records)
    assert manifest.consumed_train_rows == 8 * 4
