"""Every change of foreign code is needed: without it something breaks. And each is made once, and never silently."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from nemo_prolong.engine.patches import PATCHES
from nemo_prolong.engine.patches.patch import Patch, warnings_of_versions
from tests.support.launches import run_module

PROGRAM = "tests.engine.patch_program"
PREPARE_PROGRAM = "tests.engine.prepare_program"
NAMES = [patch.name for patch in PATCHES]


@pytest.fixture(scope="module")
def statuses(workspace: Path) -> dict[str, int]:
    output = workspace / "patches.json"
    run_module(PROGRAM, str(workspace / "data"), str(output))
    return json.loads(output.read_text())


def test_with_all_patches_a_stage_trains_and_resumes(statuses: dict[str, int]) -> None:
    assert statuses["none"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_this_patch_something_breaks(statuses: dict[str, int], name: str) -> None:
    assert statuses[name] != 0, f"{name} is no longer needed: remove it from engine/patches"


@pytest.mark.parametrize("check", ["gpu_without_a_fused_adam", "gpu_with_a_fused_adam"])
def test_with_a_gpu_cuda_stays_and_only_a_slow_adam_goes(check: str) -> None:
    run_module(PREPARE_PROGRAM, check)


def test_a_second_call_changes_nothing() -> None:
    run_module(PREPARE_PROGRAM, "twice")


def test_what_libraries_leave_is_kept_out_of_garbage_collections() -> None:
    run_module(PREPARE_PROGRAM, "collected")


def test_a_plain_configuration_of_nemo_gets_the_model_of_megatron() -> None:
    run_module(PREPARE_PROGRAM, "plain_model")


def test_every_patch_says_why_and_for_which_versions() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for patch in PATCHES:
        assert len(patch.why) > 30
        assert set(patch.versions) & {"nemo-toolkit", "megatron-core"}


def test_the_installed_versions_are_those_of_every_patch() -> None:
    assert warnings_of_versions(PATCHES) == []


@pytest.mark.parametrize(("found", "complaint"), [("2.7.3rc1+abc", None), ("2.8.0", "nemo-toolkit 2.8.0 is installed")])
def test_another_version_is_told_with_the_patches_it_concerns(
    monkeypatch: pytest.MonkeyPatch, found: str, complaint: str | None
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: found)
    patches = [Patch(name, "why", lambda: None, {"nemo-toolkit": "2.7.3"}) for name in ("first", "second")]
    warnings = warnings_of_versions(patches)
    if complaint is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(f"{complaint}, and changes of it were written for 2.7.3: first, second. Run ")


def test_prepare_warns_in_the_log_of_another_version() -> None:
    result = run_module(PREPARE_PROGRAM, "other_version")
    assert "WARNING:nemo_prolong.engine.patches:megatron-core 0.16.0 is installed" in result
    assert "group_step_adam" in result
