"""Saves that fail on one of two ranks: full disk, quota, read-only, input/output error, file size limit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.launches import run_module
from tests.support.tiny import read_metrics

PROGRAM = "tests.engine.save_failure_program"
REASONS = {
    4: "rank 1: [Errno 28] No space left on device",
    6: "rank 0: [Errno 5] Input/output error",
    10: "rank 0: [Errno 122] Disk quota exceeded",
    12: "rank 0: [Errno 30] Read-only file system",
    20: "rank 1: [Errno 5] Input/output error",
    22: "rank 0: [Errno 28] No space left on device",
    24: "rank 1: [Errno 5] Input/output error",
}
SAVED = (2, 8, 14, 18)
INTERVAL_STEPS = 2
# Two stages that save at every second step.
TIMEOUT_SECONDS = 600
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def failing_runs(workspace: Path, make_config: Callable[..., Any]) -> dict[bool, dict[str, Any]]:
    """Stages of two ranks whose saves wait, and are in the background; the faults are in the program."""
    cases = {}
    for background in (False, True):
        checkpoint = {"save_interval_steps": INTERVAL_STEPS, "async_save": background}
        cfg = make_config(name=f"failing_{background}", train={"train_iters": 30}, checkpoint=checkpoint)
        cases[background] = {"config": cfg.model_dump(mode="json"), "result": f"{cfg.run_dir}.result"}
    path = workspace / "failing.json"
    path.write_text(json.dumps(list(cases.values())))
    run_module(PROGRAM, str(path), timeout_seconds=TIMEOUT_SECONDS)
    found = {}
    for background, case in cases.items():
        run = workspace / f"failing_{background}"
        ranks = [json.loads(Path(f"{case['result']}.{rank}").read_text()) for rank in range(2)]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        found[background] = {"ranks": ranks, "events": events, "run": run, "background": background}
    return found


@pytest.fixture(params=[False, True], ids=["waiting", "in_background"])
def failing_run(request: pytest.FixtureRequest, failing_runs: dict[bool, dict[str, Any]]) -> dict[str, Any]:
    """One of them."""
    return failing_runs[request.param]


@pytest.mark.distributed
def test_every_failure_is_recorded_with_its_rank_and_reason(failing_run: dict[str, Any]) -> None:
    events = failing_run["events"]
    failed = {event["step"]: event["detail"] for event in events if event["event"] == "checkpoint_failed"}
    # What torch says of a file that the kernel cuts off depends on where that happens.
    assert failed.pop(16).startswith("rank 1: Worker failure: ")
    assert failed == REASONS
    saved = [event["step"] for event in events if event["event"] == "checkpoint_saved"]
    assert saved == list(SAVED)
    log = (failing_run["run"] / "train.rank0.log").read_text()
    assert f"checkpoint of step 4 failed, the ones before it are untouched: {REASONS[4]}" in log


@pytest.mark.distributed
def test_a_failure_keeps_the_good_checkpoint_and_nothing_partial(failing_run: dict[str, Any]) -> None:
    for step, good, names in failing_run["ranks"][0]["seen"]:
        # In the background a save is complete one step later at the earliest.
        done = [saved for saved in SAVED if saved <= step - failing_run["background"]]
        done = [saved for saved in done if not failing_run["background"] or saved < step]
        if done:
            assert good == f"step_{done[-1]:08d}"
        complete = [name for name in names if ".writing-" not in name]
        assert complete == [f"step_{saved:08d}" for saved in done[-2:]]
        assert len(names) - len(complete) <= failing_run["background"]
    assert sorted(path.name for path in (failing_run["run"] / "checkpoints").iterdir()) == [
        "step_00000014",
        "step_00000018",
    ]


@pytest.mark.distributed
def test_all_ranks_stop_after_three_failures_in_a_row(failing_run: dict[str, Any]) -> None:
    first, second = failing_run["ranks"]
    assert (
        first["error"]
        == second["error"]
        == (
            f"{failing_run['run']}/checkpoints/step_00000024: it could not be saved, 3 in a row: {REASONS[24]}. "
            "Make room or repair the file system, then repeat the command: it continues from the newest good one."
        )
    )


@pytest.mark.distributed
def test_training_goes_on_through_the_failures(failing_run: dict[str, Any]) -> None:
    steps = [record["step"] for record in read_metrics(failing_run["run"])]
    last = 24 + (INTERVAL_STEPS if failing_run["background"] else 0)
    assert steps == list(range(1, len(steps) + 1)) and 24 <= len(steps) <= last
