"""The page that follows a training step says what runs, and nothing on the way to it is read twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.launches import run_module
from tests.support.tiny import tiny_config, write_data

PAGE = Path(__file__).parents[2] / "docs" / "training_step.md"
STEP = re.compile(r"^\d+\. \[([\w.]+)\]\(\.\./(nemo_prolong/\S+\.py)\)", re.MULTILINE)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ran and what was read when a stage with a parent was started."""
    root = tmp_path_factory.mktemp("first_step")
    data = write_data(root / "data")
    (data / "manifest.json").write_text("{}")
    parent = tiny_config(data, root, name="parent", train={"train_iters": 1})
    takes = {"parent": str(root / "parent"), "transition": "weights_and_optimizer"}
    child = tiny_config(data, root, name="child", stage="stage1", train={"train_iters": 2}, **takes)
    configs, output = root / "configs.json", root / "observed.json"
    configs.write_text(json.dumps([config.model_dump(mode="json") for config in (parent, child)]))
    run_module("tests.engine.first_step_program", str(configs), str(output))
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.slow
def test_a_step_runs_what_the_page_says_in_its_order(observed: dict[str, Any]) -> None:
    named = [[path, function] for function, path in STEP.findall(PAGE.read_text())]
    assert len(named) == 20
    ran = [function for function in observed["called"] if function in named]
    assert [function for _, function in ran] == [function for _, function in named]


@pytest.mark.slow
def test_no_manifest_is_read_twice_before_the_first_step(observed: dict[str, Any]) -> None:
    manifests = {
        path: times for path, times in observed["read"].items() if Path(path).name in ("stage.json", "manifest.json")
    }
    assert manifests == {
        "parent/stage.json": 1,
        "data/manifest.json": 1,
        "parent/checkpoints/step_00000001/manifest.json": 1,
    }
