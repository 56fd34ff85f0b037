"""Every change to foreign code is needed: without it, a run on CPU fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nemo_prolong.engine.patches import cpu
from tests.support.launches import run_program

PROGRAM = "tests.engine.patch_program"


@pytest.fixture(scope="module")
def statuses(workspace: Path) -> dict[str, int]:
    output = workspace / "patches.json"
    run_program([sys.executable, "-m", PROGRAM, str(workspace / "data"), str(output)])
    return json.loads(output.read_text())


def test_with_all_patches_a_stage_trains_and_resumes(statuses: dict[str, int]) -> None:
    assert statuses["none"] == 0


@pytest.mark.parametrize("name", [patch.name for patch in cpu.patches()])
def test_without_this_patch_training_or_resume_fails(statuses: dict[str, int], name: str) -> None:
    assert statuses[name] != 0, f"{name} is no longer needed: remove it from engine/patches/cpu.py"


GPU_PROGRAM = """
import torch
torch.cuda.is_available = lambda: True
before = torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream
import megatron.core.optimizer as optimizer
from megatron.core.optimizer import distrib_optimizer
from nemo_prolong.engine.patches import cpu
from nemo_prolong.ops.adam import GroupStepAdam
{setup}
cpu.prepare()
assert (torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream) == before
assert not torch._dynamo.config.disable
{check}
"""


@pytest.mark.parametrize(
    ("setup", "check"),
    [
        ("", "assert optimizer.Adam is distrib_optimizer.Adam is GroupStepAdam and distrib_optimizer.HAVE_APEX_OR_TE"),
        (
            "optimizer.Adam = fused = type('FusedAdam', (), {}); optimizer.USING_PYTORCH_OPTIMIZER = False",
            "assert optimizer.Adam is fused",
        ),
    ],
    ids=["without a fused Adam", "with a fused Adam"],
)
def test_with_a_gpu_only_an_adam_that_cannot_resume_is_patched(setup: str, check: str) -> None:
    run_program([sys.executable, "-c", GPU_PROGRAM.format(setup=setup, check=check)])


def test_every_patch_says_why_and_for_which_versions() -> None:
    names = [patch.name for patch in cpu.patches()]
    assert len(set(names)) == len(names)
    for patch in cpu.patches():
        assert len(patch.why) > 30 and "megatron-core 0.15.3" in patch.versions
