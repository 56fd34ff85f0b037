"""The table of tested versions: NVIDIA's version strings are read as they are, and a refusal says what to have."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM
from nemo_prolong.config.tested_versions import TESTED_VERSIONS, cudnn_release

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("component", "found"),
    [
        ("torch", "2.10.0a0+b558c986e8.nv25.11"),
        ("torch", "2.13.0+cpu"),
        ("transformer_engine", "2.9.0+70f53666"),
        ("cudnn", "9.18.0"),
        ("flash_attn", "2.7.4.post1+25.11"),
        ("driver", "580.65.06"),
        ("apex", None),
    ],
)
def test_a_version_within_the_bounds_is_no_problem(component, found):
    assert TESTED_VERSIONS[component].problem(found) is None


@pytest.mark.parametrize(
    ("component", "found", "start"),
    [
        ("torch", "2.9.0a0+50eac811a6.nv25.9", "torch is 2.9.0a0+50eac811a6.nv25.9, below 2.10.0a0. pyproject.toml"),
        ("cudnn", "9.13.1", "cuDNN is 9.13.1, below 9.18.0. Before 9.18 the backward pass"),
        ("transformer_engine", "2.10.0+769ed778", "Transformer Engine is 2.10.0+769ed778, not below 2.10."),
        ("python", "3.13", "Python is 3.13, not below 3.13. requirements/gpu-py312.lock is for 3.12."),
        ("transformer_engine", None, "Transformer Engine is not there. Megatron-core 0.15.3 asks for 2.9,"),
        ("nccl", "unknown", "NCCL says its version is 'unknown', which is none. torch 2.10"),
    ],
)
def test_a_version_outside_of_the_bounds_is_said_with_the_reason(component, found, start):
    assert TESTED_VERSIONS[component].problem(found).startswith(start)


def test_every_tested_version_is_within_its_own_bounds():
    assert {name: bounds.problem(bounds.tested) for name, bounds in TESTED_VERSIONS.items()} == dict.fromkeys(
        TESTED_VERSIONS
    )


def test_only_the_release_decides_whether_a_version_is_the_tested_one():
    torch = TESTED_VERSIONS["torch"]
    assert torch.is_tested("2.10.0a0+anything.nv25.11")
    assert not torch.is_tested("2.10.0")


def test_the_range_is_a_specifier():
    assert TESTED_VERSIONS["transformer_engine"].range == ">=2.9.0a0,<2.10"
    assert TESTED_VERSIONS["apex"].range == ""


def test_the_floor_of_torch_is_that_of_the_package_and_takes_alphas():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = (Requirement(line) for line in project["dependencies"] if line.startswith("torch>"))
    assert str(requirement.specifier) == TESTED_VERSIONS["torch"].range
    assert Version("2.10.0a0+b558c986e8.nv25.11") in requirement.specifier


def test_the_rules_assume_the_tested_transformer_engine():
    assert Version(TESTED_VERSIONS["transformer_engine"].tested).release[:2] == ASSUMED_PLATFORM.transformer_engine


def test_cudnn_numbers_are_read_as_its_library_counts():
    assert [cudnn_release(number) for number in (91900, 90101, 91002)] == ["9.19.0", "9.1.1", "9.10.2"]


def test_the_table_is_read_without_torch_and_without_pydantic():
    code = "import sys, nemo_prolong.config.tested_versions; print({'torch', 'pydantic', 'hydra'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n"
