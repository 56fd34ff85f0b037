"""Signals, gradients that are no numbers, and ranks that hang, on two ranks."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import run_program
from tiny import read_metrics

from nemo_prolong.config.checkpoint_files import verify_checkpoint
from nemo_prolong.config.locations import checkpoint_directory, newest_checkpoint
from nemo_prolong.errors import EXIT_HUNG, EXIT_PREEMPTED, TrainingError
from nemo_prolong.stages.manifest import StageManifest

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("fault_program.py")
KEYS = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "consumed_train_tokens")


@pytest.fixture(scope="module")
def statuses(workspace: Path, make_config: Callable[..., Any]) -> dict[str, list[int]]:
    """Exit statuses of both ranks of every case; the runs are in the workspace."""

    def case(name: str, run: str, fault: dict[str, Any] | None = None, **faults: Any) -> dict[str, Any]:
        config = make_config(
            name=run, train={"train_iters": 6}, checkpoint={"save_interval_steps": 2, "keep_last": 9}, faults=faults
        )
        return {"name": name, "config": config.model_dump(mode="json"), "fault": fault}

    def on_rank_1(kind: str) -> dict[str, Any]:
        return {"kind": kind, "rank": 1, "step": 3}

    cases = [
        case("whole", "faults_whole"),
        case("sigterm", "faults_sigterm", on_rank_1("sigterm")),
        case("sigterm_again", "faults_sigterm"),
        case("nan", "faults_nan", on_rank_1("nan")),
        case("nan_from", "faults_nan_from", on_rank_1("nan_from"), max_skipped_in_a_row=2),
        case("sigstop", "faults_sigstop", on_rank_1("sigstop"), hang_seconds=10),
        case("sigstop_again", "faults_sigstop"),
    ]
    path, output = workspace / "fault_cases.json", workspace / "fault_statuses.json"
    path.write_text(json.dumps(cases))
    run_program([sys.executable, str(PROGRAM), str(path), str(output)])
    return json.loads(output.read_text())


def records(workspace: Path, run: str) -> list[list[Any]]:
    return [[record[key] for key in KEYS] for record in read_metrics(workspace / run)]


def events(workspace: Path, run: str, kind: str) -> list[dict[str, Any]]:
    lines = (workspace / run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_signal_to_one_rank_saves_on_all_and_ends_all_with_75(statuses: Any, workspace: Path) -> None:
    assert statuses["whole"] == [0, 0]
    assert statuses["sigterm"] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert verify_checkpoint(checkpoint_directory(workspace / "faults_sigterm", 3)).step == 3
    (event,) = events(workspace, "faults_sigterm", "stopped_by_signal")
    assert event["step"] == 3


def test_the_same_command_after_a_signal_ends_with_the_uninterrupted_losses(statuses: Any, workspace: Path) -> None:
    assert statuses["sigterm_again"] == [0, 0]
    assert records(workspace, "faults_sigterm") == records(workspace, "faults_whole")
    assert StageManifest.read(workspace / "faults_sigterm").status == "complete"


def test_a_nan_on_one_rank_skips_the_step_on_all(statuses: Any, workspace: Path) -> None:
    assert statuses["nan"] == [0, 0]
    (event,) = events(workspace, "faults_nan", "step_skipped")
    assert event["step"] == 3 and event["detail"] == "grad norm is nan"
    assert StageManifest.read(workspace / "faults_nan").skipped_steps == 1
    skipped, whole = (read_metrics(workspace / run) for run in ("faults_nan", "faults_whole"))
    # Before the step nothing differs; its rows and its place in the schedule are used up; its update is not made.
    assert [record["loss"] for record in skipped[:3]] == [record["loss"] for record in whole[:3]]
    assert [record["learning_rate"] for record in skipped] == [record["learning_rate"] for record in whole]
    assert [record["target_tokens"] for record in skipped] == [record["target_tokens"] for record in whole]
    assert skipped[3]["loss"] > whole[3]["loss"] and skipped[5]["loss"] < skipped[3]["loss"]


def test_steps_that_are_skipped_in_a_row_stop_the_stage_on_all_ranks(statuses: Any, workspace: Path) -> None:
    assert statuses["nan_from"] == [TrainingError.exit_code, TrainingError.exit_code]
    message = (workspace / "nan_from.rank0.log").read_text()
    assert "step 4: 2 steps in a row would have harmed the model; the last one: grad norm is nan." in message
    run = workspace / "faults_nan_from"
    assert newest_checkpoint(run) == checkpoint_directory(run, 2)


def test_a_rank_that_waits_for_a_stopped_one_says_where_it_stands_and_ends(statuses: Any, workspace: Path) -> None:
    assert statuses["sigstop"] == [EXIT_HUNG, -signal.SIGKILL]
    (event,) = events(workspace, "faults_sigstop", "hang")
    assert event["detail"] == "rank 0 made no progress for 10 s; its stacks are in stacks.rank0.txt"
    stacks = (workspace / "faults_sigstop" / "stacks.rank0.txt").read_text()
    assert "stage_training.py" in stacks and "watchdog.py" in stacks


def test_a_run_that_hung_continues_with_the_uninterrupted_losses(statuses: Any, workspace: Path) -> None:
    assert statuses["sigstop_again"] == [0, 0]
    assert records(workspace, "faults_sigstop") == records(workspace, "faults_whole")
