"""Steps and stages whose rows have no target token, on two ranks that share rows or have rows of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.data.mds import MdsReader, MdsWriter
from nemo_prolong.errors import DataError
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from tests.support.launches import run_module
from tests.support.tiny import COLUMNS, SEQ_LENGTH, write_data

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LAYOUTS: dict[str, dict[str, int]] = {"dp2": {}, "cp2": {"context_parallel_size": 2}}
STEPS, SINGLE_STEP, EMPTY_STEPS = 4, 2, (1, 3)
"""One step has a single target token, so that one of the ranks has none. The steps before and after have none at all,
the first of them before there is any state of the optimizer."""


def rows_of(root: Path, step: int) -> list[int]:
    """Return the stored rows of a step, of which each takes four. Their order is one for all sets of as many rows."""
    rows = PackedRowDataset(root, [MixtureEntry(path="rows", proportion=1.0)], SEQ_LENGTH, 42, 4 * STEPS)
    return [int(rows.place(index).rsplit(" ", 1)[1]) for index in range(4 * (step - 1), 4 * step)]


def write_masked(root: Path, path: str, masks: Callable[[int], np.ndarray]) -> None:
    """Write the rows of the tiny data once more, with masks."""
    reader = MdsReader(root / "rows")
    with MdsWriter(root / path, {**COLUMNS, "mask": "ndarray:uint8"}) as writer:
        for number in range(len(reader)):
            row = reader[number]
            writer.write({**row, "mask": masks(number)[: len(row["input_ids"])]})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row sets with masks: ``masked`` has targets in some steps, ``empty`` has none."""
    root = write_data(tmp_path_factory.mktemp("no_targets") / "data")
    write_masked(root, "empty", lambda row: np.zeros(SEQ_LENGTH, np.uint8))
    single, empty = rows_of(root, SINGLE_STEP), [row for step in EMPTY_STEPS for row in rows_of(root, step)]
    assert not {*single, *empty} & {*rows_of(root, STEPS)}

    def mask(row: int) -> np.ndarray:
        targets = np.full(SEQ_LENGTH, row not in (*single, *empty), np.uint8)
        if row == single[0]:
            # Not the first token of a document, which has no loss.
            start, _ = max(MdsReader(root / "rows")[row]["indices"].tolist(), key=lambda span: span[1] - span[0])
            targets[start + 1] = 1
        return targets

    write_masked(root, "masked", mask)
    return root


@pytest.fixture(scope="module")
def statuses(root: Path, workspace: Path, make_config: Callable[..., Any]) -> dict[str, list[int]]:
    """Exit statuses of both ranks of every case; the runs are in the workspace."""

    def case(name: str, path: str, train_iters: int, *validation: str, **changes: Any) -> dict[str, Any]:
        data = {
            "root": str(root),
            "mixture": [{"path": path, "proportion": 1.0}],
            "apply_instruct_masks": True,
            "validation": list(validation),
        }
        train = {"train_iters": train_iters, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
        # The weights of one layout are compared step by step.
        checkpoint = {"save_interval_steps": 100 if name == "cp2" else 1, "keep_last": 9}
        config = make_config(name=f"targets_{name}", data=data, train=train, checkpoint=checkpoint, **changes)
        return {"name": f"targets_{name}", "config": config.model_dump(mode="json"), "fault": None}

    cases = [case(name, "masked", STEPS, parallelism=layout) for name, layout in LAYOUTS.items()]
    cases += [case("none", "empty", 2), case("none", "empty", 2), case("validation", "masked", 2, "empty")]
    path, output = workspace / "target_cases.json", workspace / "target_statuses.json"
    path.write_text(json.dumps(cases))
    run_module("tests.engine.fault_program", str(path), str(output), timeout_seconds=600)
    return json.loads(output.read_text())


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run as a strict reader does."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def events(run: Path) -> list[tuple[int, str]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [(event["step"], event["detail"]) for event in lines if event["event"] == "no_targets"]


def test_a_step_without_targets_changes_no_weight(statuses: Any, workspace: Path) -> None:
    weights = []
    for step in (2, 3, 4):
        reader = CheckpointReader(checkpoint_directory(workspace / "targets_dp2", step))
        weights.append({tensor: reader.read(tensor) for tensor in reader.names()})
    before, after, trained = weights
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert not all(torch.equal(after[tensor], trained[tensor]) for tensor in after)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_without_targets_is_recorded_without_a_loss(
    statuses: Any, workspace: Path, root: Path, name: str
) -> None:
    assert statuses[f"targets_{name}"] == [0, 0]
    run = workspace / f"targets_{name}"
    records = metrics(run)
    # A rank that has none of the step's only target is no reason to skip.
    assert [record["target_tokens"] for record in records][:3] == [0, 1, 0]
    assert [record["loss"] is None for record in records] == [True, False, True, False]
    assert [record["skipped_steps"] for record in records] == [1, 1, 2, 2]
    named = {step: ", ".join(f"{root / 'masked'} row {row}" for row in rows_of(root, step)) for step in EMPTY_STEPS}
    assert events(run) == list(named.items())
    assert StageManifest.read(run).consumed_target_tokens == sum(record["target_tokens"] for record in records)
    console = (workspace / f"targets_{name}.rank0.log").read_text()
    assert "step 3/4  loss none  grad norm 0.000" in console and "targets 0.0%" in console


def test_both_layouts_skip_alike_and_report_the_same_losses(statuses: Any, workspace: Path) -> None:
    one, other = (metrics(workspace / f"targets_{name}") for name in LAYOUTS)
    for left, right in zip(one, other, strict=True):
        assert left["target_tokens"] == right["target_tokens"]
        if left["loss"] is not None:
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)


def test_a_stage_without_a_target_ends_with_3_on_every_rank(statuses: Any, workspace: Path, root: Path) -> None:
    assert statuses["targets_none"] == [DataError.exit_code, DataError.exit_code]
    assert StageManifest.read(workspace / "targets_none").status != "complete"
    for rank in range(2):
        message = (workspace / f"targets_none.rank{rank}.log").read_text()
        assert "step 2: 2 steps in a row had no target token, so there was nothing to learn" in message
        assert f"the rows of the last one: {root / 'empty'} row " in message


def test_a_run_is_resumed_from_before_its_first_update(statuses: Any, workspace: Path) -> None:
    lines = (workspace / "targets_none" / "events.jsonl").read_text().splitlines()
    told = [(event["event"], event["step"]) for event in map(json.loads, lines)]
    first = [("started", 0), ("no_targets", 1), ("checkpoint_saved", 1), ("no_targets", 2)]
    assert told == [*first, ("resumed", 1), ("no_targets", 2)]


def test_a_validation_without_a_target_is_refused(statuses: Any, workspace: Path) -> None:
    assert statuses["targets_validation"] == [DataError.exit_code, DataError.exit_code]
    message = (workspace / "targets_validation.rank1.log").read_text()
    assert "data.validation=empty: no token of the 4 rows that a validation takes is a target" in message
