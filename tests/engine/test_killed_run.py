"""A run that was killed, and the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_prolong.stages.manifest import StageManifest
from tests.support.launches import run_program
from tests.support.tiny import read_metrics

PROGRAM = "tests.engine.stage_program"
CANARY = "cAnArY0123456789"


@pytest.fixture(scope="module")
def killed_run(one_rank_runs: Path, make_config: Callable[..., Any]) -> dict[str, Any]:
    """Kill a copy of the run ``whole`` after step 6, two steps behind its checkpoint, and start it again."""
    cfg = make_config(
        name="killed",
        train={"train_iters": 8},
        checkpoint={"save_interval_steps": 4, "keep_last": 9},
        tracker={"tensorboard": True},
        cluster={"account": CANARY},
    )
    secrets = {"SOME_SERVICE_TOKEN": CANARY}
    path = one_rank_runs / "killed.json"
    path.write_text(json.dumps(cfg.model_dump(mode="json")))
    first = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(path), "6"], capture_output=True, timeout=200, env={**os.environ, **secrets}
    )
    run_dir = Path(cfg.run_dir)
    seen = {"status": first.returncode, "steps": len(read_metrics(run_dir)), "first": StageManifest.read(run_dir)}
    run_program([sys.executable, "-m", PROGRAM, str(path)], **secrets)
    return {**seen, "run": run_dir, "second": StageManifest.read(run_dir)}


def test_the_first_process_died_two_steps_after_its_checkpoint(killed_run: dict[str, Any]) -> None:
    assert killed_run["status"] == -signal.SIGKILL
    assert killed_run["steps"] == 6
    assert killed_run["first"].status == "running"


def test_the_same_command_gives_every_step_once(killed_run: dict[str, Any], one_rank_runs: Path) -> None:
    keys = (
        *("step", "loss", "grad_norm", "learning_rate", "target_tokens", "consumed_train_tokens"),
        *("loss_by_position", "loss_by_domain", "model_flops", "skipped_steps"),
    )
    killed, whole = (
        [[record[key] for key in keys] for record in read_metrics(run)]
        for run in (killed_run["run"], one_rank_runs / "whole")
    )
    assert killed == whole


def test_the_manifest_counts_the_whole_stage_once(killed_run: dict[str, Any]) -> None:
    manifest, records = killed_run["second"], read_metrics(killed_run["run"])
    assert manifest.status == "complete" and manifest.step == 8
    assert manifest.started_at == killed_run["first"].started_at
    assert manifest.consumed_train_tokens == sum(record["real_tokens"] for record in records)
    assert manifest.consumed_target_tokens == sum(record["target_tokens"] for record in records)
    assert manifest.consumed_train_rows == 8 * 4


def test_events_tell_both_starts_and_what_the_kill_lost(killed_run: dict[str, Any]) -> None:
    run_dir = killed_run["run"]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event["step"], event["detail"].split(":")[0]) for event in events]
    assert told == [
        ("started", 0, "from scratch, on 1 rank"),
        ("checkpoint_saved", 4, "step_00000004"),
        ("resumed", 4, "from step_00000004, on 1 rank"),
        ("checkpoint_saved", 8, "step_00000008"),
        ("complete", 8, "8 of 8 steps"),
    ]
    records = read_metrics(run_dir)
    useful, wall = sum(record["step_seconds"] for record in records), records[-1]["time"] - events[0]["time"]
    assert records[-1]["goodput"] == pytest.approx(useful / wall, rel=0.01)
    # Between the two starts NeMo was imported again.
    assert wall > 2 * useful
    before_the_kill = records[3]["goodput"]
    assert before_the_kill == pytest.approx(
        sum(record["step_seconds"] for record in records[:4]) / (records[3]["time"] - events[0]["time"]), rel=0.01
    )


def test_tensorboard_shows_every_step_of_two_processes_once(killed_run: dict[str, Any]) -> None:
    events = EventAccumulator(str(killed_run["run"] / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


def test_no_file_of_the_run_holds_a_secret(killed_run: dict[str, Any]) -> None:
    files = [path for path in killed_run["run"].rglob("*") if path.is_file()]
    assert {"config.json", "stage.json", "train.log", "events.jsonl"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert json.loads((killed_run["run"] / "config.json").read_text())["cluster"]["account"] == "<hidden>"
