"""Signals, gradients that are no numbers, ranks that hang or die, full disks and clocks that differ, on two ranks."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.errors import EXIT_HUNG, EXIT_PREEMPTED, CheckpointError, TrainingError
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.checkpoint.verify import newest_checkpoint, verify_checkpoint
from nemo_prolong.stages.manifest import StageManifest
from tests.support.launches import run_module, run_program
from tests.support.tiny import read_metrics

TIMEOUT_SECONDS = 1200
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(TIMEOUT_SECONDS)]

PROGRAM = "tests.engine.fault_program"
RESTART_PROGRAM = "tests.engine.restart_program"
STEPS = 6
# Rank that dies in the save of step 4, and where in it.
KILLS = [(1, "half_a_shard"), (1, "shards_written"), (0, "manifest_written")]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    "ft_launcher": ["nvidia_resiliency_ext.fault_tolerance.launcher", "--ignore-missing-fault-tol-cfg"],
}
FULL = "[Errno 28] No space left on device"
KEYS = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "consumed_train_tokens")


@pytest.fixture(scope="module")
def statuses(workspace: Path, make_config: Callable[..., Any]) -> dict[str, list[int]]:
    """Exit statuses of both ranks of every case; the runs are in the workspace."""

    def case(
        name: str, run: str, fault: dict[str, Any] | None = None, *, train_iters: int = STEPS, **changes: Any
    ) -> dict[str, Any]:
        checkpoint = {"save_interval_steps": 2, "keep_last": 9, **changes.pop("checkpoint", {})}
        config = make_config(name=run, train={"train_iters": train_iters}, checkpoint=checkpoint, **changes)
        return {"name": name, "config": config.model_dump(mode="json"), "fault": fault}

    def on_rank_1(kind: str, step: int = 3, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "rank": 1, "step": step, **more}

    clocks = {"kind": "clock", "rank": 0, "other_rank": 1, "minutes": [1, 100]}
    cases = [
        case("whole", "faults_whole"),
        case("sigterm", "faults_sigterm", on_rank_1("sigterm")),
        case("sigterm_again", "faults_sigterm"),
        case("saved_at_last", "faults_saved_at_last", on_rank_1("unsaved_stop", step=4, times=1)),
        case(
            "damaged",
            "faults_saved_at_last",
            {"kind": "damage", "rank": 0, "step": 4, "run": str(workspace / "faults_saved_at_last")},
            checkpoint={"save_interval_steps": 5, "keep_last": 3},
        ),
        case("not_saved", "faults_not_saved", on_rank_1("unsaved_stop", step=4, times=9)),
        case("nan", "faults_nan", on_rank_1("nan")),
        case("nan_first", "faults_nan_first", on_rank_1("nan", step=1)),
        case("nan_stopped", "faults_nan_stopped", on_rank_1("nan_and_sigterm", step=1)),
        case("nan_stopped_again", "faults_nan_stopped"),
        case("nan_from", "faults_nan_from", on_rank_1("nan", on=True), faults={"max_skipped_in_a_row": 2}),
        case("sigstop", "faults_sigstop", on_rank_1("sigstop"), faults={"hang_seconds": 10}),
        case("sigstop_again", "faults_sigstop"),
        case("full_disk", "faults_full_disk", {"kind": "full_disk", "rank": 0, "step": 3, "until": 5}),
        case(
            "clocks",
            "faults_clocks",
            clocks,
            train_iters=8,
            checkpoint={"save_interval_steps": 5, "save_interval_minutes": 2},
            faults={"hang_seconds": 20},
        ),
    ]
    for rank, point in KILLS:
        name, fault = f"kill_{rank}_{point}", {"kind": "kill_in_save", "rank": rank, "step": 4, "point": point}
        cases += [case(name, f"faults_{name}", fault), case(f"{name}_again", f"faults_{name}")]
    path, output = workspace / "fault_cases.json", workspace / "fault_statuses.json"
    path.write_text(json.dumps(cases))
    run_module(PROGRAM, str(path), str(output), timeout_seconds=TIMEOUT_SECONDS)
    return json.loads(output.read_text())


def records(workspace: Path, run: str) -> list[list[Any]]:
    return [[record[key] for key in KEYS] for record in read_metrics(workspace / run)]


def events(workspace: Path, run: str, kind: str) -> list[dict[str, Any]]:
    lines = (workspace / run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_signal_to_one_rank_saves_on_all_and_gives_75(statuses: Any, workspace: Path) -> None:
    assert statuses["whole"] == [0, 0]
    assert statuses["sigterm"] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert verify_checkpoint(checkpoint_directory(workspace / "faults_sigterm", 3)).step == 3
    (event,) = events(workspace, "faults_sigterm", "stopped_by_signal")
    assert event["step"] == 3


def test_a_repeated_command_ends_with_the_uninterrupted_losses(statuses: Any, workspace: Path) -> None:
    assert statuses["sigterm_again"] == [0, 0]
    assert records(workspace, "faults_sigterm") == records(workspace, "faults_whole")
    assert StageManifest.read(workspace / "faults_sigterm").status == "complete"


def test_a_stop_in_a_step_whose_save_failed_saves_it_again(statuses: Any, workspace: Path) -> None:
    assert statuses["saved_at_last"] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    run = workspace / "faults_saved_at_last"
    (failure,) = events(workspace, run.name, "checkpoint_failed")
    assert (failure["step"], failure["detail"]) == (4, f"rank 1: {FULL}")
    (stopped,) = events(workspace, run.name, "stopped_by_signal")
    saved = [event for event in events(workspace, run.name, "checkpoint_saved") if event["time"] < stopped["time"]]
    assert [event["step"] for event in saved] == [2, 4]


def test_a_damaged_newest_checkpoint_goes_and_the_good_ones_stay(statuses: Any, workspace: Path) -> None:
    assert statuses["damaged"] == [0, 0]
    run = workspace / "faults_saved_at_last"
    (resumed,) = events(workspace, run.name, "resumed")
    assert resumed["detail"] == "from step_00000002, on 2 ranks"
    assert records(workspace, run.name) == records(workspace, "faults_whole")
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000005", "step_00000006"]


def test_a_stop_that_cannot_be_saved_does_not_claim_it_was(statuses: Any, workspace: Path) -> None:
    assert statuses["not_saved"] == [CheckpointError.exit_code, CheckpointError.exit_code]
    run = workspace / "faults_not_saved"
    for rank in range(2):
        message = (workspace / f"not_saved.rank{rank}.log").read_text()
        assert f"{checkpoint_directory(run, 4)}: it could not be saved, 2 in a row: rank 1: {FULL}." in message
    assert events(workspace, run.name, "stopped_by_signal") == []
    assert newest_checkpoint(run) == checkpoint_directory(run, 2)


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


def test_a_save_before_the_first_step_of_the_optimizer_resumes(statuses: Any, workspace: Path) -> None:
    assert statuses["nan_first"] == statuses["nan_stopped_again"] == [0, 0]
    assert statuses["nan_stopped"] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    (resumed,) = events(workspace, "faults_nan_stopped", "resumed")
    assert resumed["detail"] == "from step_00000001, on 2 ranks"
    # The gradient norm of the step that was skipped is no number, which equals nothing.
    whole, stopped = (records(workspace, run)[1:] for run in ("faults_nan_first", "faults_nan_stopped"))
    assert stopped == whole and len(whole) == STEPS - 1


def test_steps_skipped_in_a_row_stop_the_stage_on_all_ranks(statuses: Any, workspace: Path) -> None:
    assert statuses["nan_from"] == [TrainingError.exit_code, TrainingError.exit_code]
    message = (workspace / "nan_from.rank0.log").read_text()
    assert "step 4: 2 steps in a row would have harmed the model; the last one: grad norm is nan." in message
    run = workspace / "faults_nan_from"
    assert newest_checkpoint(run) == checkpoint_directory(run, 2)


def test_a_rank_that_waits_too_long_says_where_and_ends(statuses: Any, workspace: Path) -> None:
    assert statuses["sigstop"] == [EXIT_HUNG, -signal.SIGKILL]
    (event,) = events(workspace, "faults_sigstop", "hang")
    assert event["detail"] == "rank 0 made no progress for 10 s; its stacks are in stacks.rank0.txt"
    stacks = (workspace / "faults_sigstop" / "stacks.rank0.txt").read_text()
    assert "stage_training.py" in stacks and "watchdog.py" in stacks


def test_a_run_that_hung_continues_with_the_same_losses(statuses: Any, workspace: Path) -> None:
    assert statuses["sigstop_again"] == [0, 0]
    assert records(workspace, "faults_sigstop") == records(workspace, "faults_whole")


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(statuses: Any, workspace: Path) -> None:
    assert statuses["full_disk"] == [0, 0]
    assert records(workspace, "faults_full_disk") == [
        record for record in records(workspace, "faults_whole") if record[0] not in (3, 4)
    ]
    run = workspace / "faults_full_disk"
    saved = [event["step"] for event in events(workspace, run.name, "checkpoint_saved")]
    assert saved == [2, 6] and newest_checkpoint(run) == checkpoint_directory(run, 6)
    assert not checkpoint_directory(run, 4).exists()
    console = (workspace / "full_disk.rank0.log").read_text()
    assert "the record of step 3 could not be written: [Errno 27] File too large" in console


def test_saves_by_the_clock_follow_rank_0(statuses: Any, workspace: Path) -> None:
    assert statuses["clocks"] == [0, 0]
    # A step takes a minute there and 100 on rank 1. By the clock 2, 4 and 7; every fifth 5; the last 8.
    assert [event["step"] for event in events(workspace, "faults_clocks", "checkpoint_saved")] == [2, 4, 5, 7, 8]


@pytest.mark.parametrize(("rank", "point"), KILLS)
def test_a_rank_killed_in_a_save_ends_the_other(statuses: Any, workspace: Path, rank: int, point: str) -> None:
    name = f"kill_{rank}_{point}"
    assert statuses[name][rank] == -signal.SIGKILL
    # The other one learns it from the next collective, without a handler of ours.
    assert statuses[name][1 - rank] == 1
    (resumed,) = events(workspace, f"faults_{name}", "resumed")
    assert resumed["detail"] == "from step_00000002, on 2 ranks"


@pytest.mark.parametrize(("rank", "point"), KILLS)
def test_a_rank_killed_in_a_save_changes_no_loss(statuses: Any, workspace: Path, rank: int, point: str) -> None:
    name = f"kill_{rank}_{point}"
    assert statuses[f"{name}_again"] == [0, 0]
    assert records(workspace, f"faults_{name}") == records(workspace, "faults_whole")
    left = sorted(path.name for path in (workspace / f"faults_{name}" / "checkpoints").iterdir())
    assert left == ["step_00000002", "step_00000004", "step_00000006"]


@pytest.fixture(scope="module")
def restartable(workspace: Path, make_config: Callable[..., Any]) -> Callable[[str, list[str], Any], Path]:
    """Run a case under a launcher that starts failed ranks again; return its run directory."""

    def run(name: str, launcher: list[str], fault: dict[str, Any] | None) -> Path:
        config = make_config(
            name=name,
            train={"train_iters": STEPS},
            checkpoint={"save_interval_steps": 2},
            faults={"hang_seconds": 20},
        )
        path = workspace / f"{name}.json"
        path.write_text(json.dumps({"name": name, "config": config.model_dump(mode="json"), "fault": fault}))
        command = [sys.executable, "-m", *launcher, "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        run_program([*command, "-m", RESTART_PROGRAM, str(path)], timeout_seconds=TIMEOUT_SECONDS)
        return workspace / name

    return run


@pytest.fixture(scope="module")
def left_alone(restartable: Any) -> Path:
    """The run without a fault."""
    return restartable("left_alone", LAUNCHERS["torchrun"], None)


@pytest.mark.recipe
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launcher_starts_all_ranks_again_after_a_hang(restartable: Any, left_alone: Path, launcher: str) -> None:
    if launcher == "ft_launcher":
        pytest.importorskip("nvidia_resiliency_ext", reason="ft_launcher is not of the environment: docs/faults.md")
    run = restartable(f"hung_{launcher}", LAUNCHERS[launcher], {"kind": "sigstop", "rank": 1, "step": 3})
    told = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert told == ["started", "checkpoint_saved", "hang", "resumed", *["checkpoint_saved"] * 2, "complete"]
    assert (run / "stacks.rank0.txt").exists() and not (run / "stacks.rank1.txt").exists()
    assert records(run.parent, run.name) == records(run.parent, left_alone.name)
