"""A run that is killed with SIGKILL in the save path, or at any time, and repeated is the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import load as load_distributed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from tests.support.launches import run_module
from tests.support.tiny import read_metrics

PROGRAM = "tests.engine.kill_program"
# Point of the save path -> the step that a repetition continues from.
POINTS = {
    "save_due": 2,
    "directory_made": 2,
    "planned": 2,
    "half_a_shard": 2,
    "one_of_two_shards": 2,
    "shards_written": 2,
    "metadata_written": 2,
    "common_written": 2,
    "format_written": 2,
    "model_written": 2,
    "hashed": 2,
    "manifest_written": 2,
    "published": 4,
    "half_a_deletion": 4,
    "old_deleted": 4,
}
RANDOM_KILLS = int(os.environ.get("PROLONG_RANDOM_KILLS", "5"))
# Five seconds of processor time a kill.
TIMEOUT_SECONDS = 600 + 20 * RANDOM_KILLS
TRAIN_ITERS = 6
pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_SECONDS)]
EXACT = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "real_tokens", "consumed_train_tokens")


@pytest.fixture(scope="module")
def scenarios(workspace: Path, make_config: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """All kills, in one program."""
    checkpoint = {"save_interval_steps": 2, "keep_last": 1}
    cfg = make_config(train={"train_iters": TRAIN_ITERS}, checkpoint=checkpoint)
    spec = {
        "config": {**cfg.model_dump(mode="json"), "runs_dir": str(workspace / "kills")},
        "points": list(POINTS),
        "shares": [random.Random(seed).random() for seed in range(RANDOM_KILLS)],
        "result": str(workspace / "kills.result"),
    }
    path = workspace / "kills.json"
    path.write_text(json.dumps(spec))
    run_module(PROGRAM, str(path), timeout_seconds=TIMEOUT_SECONDS)
    seen = [json.loads(Path(f"{spec['result']}.{half}").read_text()) for half in range(2)]
    return {scenario["name"]: scenario for half in seen for scenario in half}


def metrics(workspace: Path, name: str) -> list[list[Any]]:
    return [[record[key] for key in EXACT] for record in read_metrics(workspace / "kills" / name)]


def final_tensors(workspace: Path, name: str) -> dict[str, torch.Tensor]:
    """Return weights and optimizer state after the last step."""
    weights = checkpoint_directory(workspace / "kills" / name, TRAIN_ITERS) / "weights"
    entries = FileSystemReader(weights).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_distributed(state, storage_reader=FileSystemReader(weights), planner=DefaultLoadPlanner(), no_dist=True)
    return state


def assert_as_if_never_killed(workspace: Path, name: str) -> None:
    assert metrics(workspace, name) == metrics(workspace, "whole")
    expected, actual = final_tensors(workspace, "whole"), final_tensors(workspace, name)
    assert expected.keys() == actual.keys() and len(expected) > 20
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    checkpoints = [path.name for path in (workspace / "kills" / name / "checkpoints").iterdir()]
    assert checkpoints == [f"step_{TRAIN_ITERS:08d}"]


def test_the_uninterrupted_run_has_every_step(scenarios: dict[str, Any], workspace: Path) -> None:
    assert [record[0] for record in metrics(workspace, "whole")] == list(range(1, TRAIN_ITERS + 1))


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_in_a_save_loses_one_interval_and_no_bit(scenarios: dict[str, Any], workspace: Path, point: str) -> None:
    scenario = scenarios[f"at_{point}"]
    assert scenario["killed"] == -signal.SIGKILL
    assert scenario["resumed"] == f"step_{POINTS[point]:08d}"
    assert scenario["repeated"] == 0
    assert_as_if_never_killed(workspace, scenario["name"])


def test_what_the_kills_left_shows_where_they_hit(scenarios: dict[str, Any]) -> None:
    left = {name: [entry.split("-")[0] for entry in scenarios[f"at_{name}"]["left"]] for name in POINTS}
    assert left["save_due"] == ["step_00000002"]
    assert left["half_a_shard"] == ["step_00000002", "step_00000004.writing"]
    assert left["manifest_written"] == ["step_00000002", "step_00000004.writing"]
    assert left["published"] == ["step_00000002", "step_00000004"]
    assert left["half_a_deletion"] == ["step_00000002.deleting", "step_00000004"]
    assert left["old_deleted"] == ["step_00000004"]


def test_no_writer_outlives_the_run_that_was_killed(scenarios: dict[str, Any]) -> None:
    command_lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [line for line in command_lines if PROGRAM.encode() in line]


@pytest.mark.parametrize("kill", range(RANDOM_KILLS))
def test_a_kill_at_a_random_time_changes_no_bit(scenarios: dict[str, Any], workspace: Path, kill: int) -> None:
    scenario = scenarios[f"after_{kill}"]
    assert scenario["repeated"] == 0
    assert_as_if_never_killed(workspace, scenario["name"])
