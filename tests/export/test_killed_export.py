"""An export that is killed leaves no half directory under its name, and its command repeated leaves a whole one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.export_tools import Workspace
from tests.support.launches import run_module

PROGRAM = "tests.export.kill_program"
SIGKILL = -9

BEFORE = {
    # Name of the scenario: where it is killed, whether an earlier export is there, what then has the output's name.
    "new_in_a_file": ("in a file", False, None),
    "new_before_the_manifest": ("before the manifest", False, None),
    "new_before_the_rename": ("before the rename", False, None),
    "new_after_the_rename": ("after the first rename", False, "bfloat16"),
    "again_in_a_file": ("in a file", True, "float32"),
    "again_before_the_renames": ("before the rename", True, "float32"),
    "again_between_the_renames": ("after the first rename", True, None),
    "again_after_the_renames": ("after the second rename", True, "bfloat16"),
    "again_in_the_removal": ("in the removal", True, "bfloat16"),
}


@dataclass(frozen=True)
class Kills:
    """What the program did.

    Attributes:
        exports: Holds a directory for each scenario, and a copy of it as the kill left it.
        exit_codes: Of the killed export and of its repetition.
    """

    exports: Path
    exit_codes: dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def kills(workspace: Workspace, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Kills:
    root = tmp_path_factory.mktemp("killed")
    (root / "exports").mkdir()
    scenarios = [
        {"name": name, "point": point, "earlier": str(exported) if earlier else None}
        for name, (point, earlier, _) in BEFORE.items()
    ]
    command = [f"run={workspace.child}", "dtype=bf16", "overwrite=true", "verify=false", "max_shard_bytes=100000"]
    spec = {
        "command": command,
        "exports": str(root / "exports"),
        "scenarios": scenarios,
        "result": str(root / "result.json"),
    }
    (root / "spec.json").write_text(json.dumps(spec))
    run_module(PROGRAM, str(root / "spec.json"))
    return Kills(root / "exports", json.loads((root / "result.json").read_text()))


def dtype_of_whole(directory: Path) -> str | None:
    """Return the dtype of an export after comparing every file with its manifest; None where there is no directory."""
    if not directory.exists():
        return None
    manifest = json.loads((directory / "export_manifest.json").read_text())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    del hashes["export_manifest.json"]
    assert hashes == {name: file["sha256"] for name, file in manifest["files"].items()}
    return manifest["dtype"]


@pytest.mark.parametrize("scenario", BEFORE)
def test_a_killed_export_leaves_a_whole_directory_or_none(kills: Kills, scenario: str) -> None:
    assert kills.exit_codes[scenario]["killed"] == SIGKILL
    assert dtype_of_whole(kills.exports / f"{scenario}.left" / "hf") == BEFORE[scenario][2]


def test_a_kill_between_renames_leaves_the_earlier_export_whole(kills: Kills) -> None:
    left = kills.exports / "again_between_the_renames.left"
    assert dtype_of_whole(left / ".hf.replaced") == "float32"


@pytest.mark.parametrize("scenario", BEFORE)
def test_the_same_command_finishes_and_cleans_up(kills: Kills, scenario: str) -> None:
    assert kills.exit_codes[scenario]["repeated"] == 0
    assert dtype_of_whole(kills.exports / scenario / "hf") == "bfloat16"
    assert [path.name for path in (kills.exports / scenario).iterdir()] == ["hf"]
