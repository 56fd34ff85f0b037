"""Every change of foreign code is needed: without it something breaks. And each is made once, and never silently."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from nemo_prolong.engine.patches import PATCHES
from nemo_prolong.engine.patches.patch import Patch, warnings_of_versions
from tests.support.launches import run_program

PROGRAM = "tests.engine.patch_program"
NAMES = [patch.name for patch in PATCHES]


@pytest.fixture(scope="module")
def statuses(workspace: Path) -> dict[str, int]:
    output = workspace / "patches.json"
    run_program([sys.executable, "-m", PROGRAM, str(workspace / "data"), str(output)])
    return json.loads(output.read_text())


def test_with_all_patches_a_stage_trains_and_resumes(statuses: dict[str, int]) -> None:
    assert statuses["none"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_this_patch_something_breaks(statuses: dict[str, int], name: str) -> None:
    assert statuses[name] != 0, f"{name} is no longer needed: remove it from engine/patches"


GPU_PROGRAM = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (8, 0)
before = torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream
import megatron.core.optimizer as optimizer
from megatron.core.optimizer import distrib_optimizer
from nemo_prolong.engine.patches import prepare
from nemo_prolong.ops.adam import GroupStepAdam
{setup}
prepare()
assert (torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream) == before
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
def test_with_a_gpu_cuda_stays_and_only_a_slow_adam_goes(setup: str, check: str) -> None:
    run_program([sys.executable, "-c", GPU_PROGRAM.format(setup=setup, check=check)])


ONCE = """
from nemo_prolong.engine.patches import prepare
prepare()
from megatron.core import parallel_state
import torch
changed = parallel_state.initialize_model_parallel, torch.cuda.current_device, torch.Tensor.type
prepare()
assert changed == (parallel_state.initialize_model_parallel, torch.cuda.current_device, torch.Tensor.type)
"""


def test_a_second_call_changes_nothing() -> None:
    run_program([sys.executable, "-c", ONCE])


PLAIN_MODEL = """
from nemo_prolong.engine.patches import prepare
prepare()
from megatron.core.models.gpt.gpt_model import GPTModel
from nemo.collections import llm
from nemo_prolong.engine.inference import start_single_process
from nemo_prolong.engine.model.torch_layers import torch_layer_spec
start_single_process()
config = llm.LlamaConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, seq_length=8, vocab_size=16,
    use_cpu_initialization=True, transformer_layer_spec=torch_layer_spec, gradient_accumulation_fusion=False,
    masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
)
assert type(config.configure_model(None)) is GPTModel
"""


def test_a_plain_configuration_of_nemo_gets_the_model_of_megatron() -> None:
    run_program([sys.executable, "-c", PLAIN_MODEL])


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


OTHER_VERSION = """
import importlib.metadata, logging
logging.basicConfig()
version = importlib.metadata.version
importlib.metadata.version = lambda package: "0.16.0" if package == "megatron-core" else version(package)
from nemo_prolong.engine.patches import prepare
prepare()
"""


def test_prepare_warns_in_the_log_of_another_version() -> None:
    result = run_program([sys.executable, "-c", f"import sys; sys.stderr = sys.stdout\n{OTHER_VERSION}"])
    assert "WARNING:nemo_prolong.engine.patches:megatron-core 0.16.0 is installed" in result
    assert "group_step_adam" in result
