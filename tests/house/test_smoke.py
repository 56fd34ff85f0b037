"""docker/smoke.py: what is installed here passes, and each kind of fault is named."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nemo_prolong.config.tested_versions import TESTED_VERSIONS

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "docker" / "smoke.py"


@pytest.fixture(scope="module")
def smoke():
    spec = importlib.util.spec_from_file_location("smoke", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_locked_stack_imports_with_one_complaint():
    command = [sys.executable, PROGRAM, "--lock", ROOT / "requirements" / "cpu.lock"]
    command += ["--expect", "python=3.11", "--expect", "transformer_engine=2.9"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(result.stdout)
    assert report["problems"] == [
        "transformer_engine is missing (ModuleNotFoundError: No module named 'transformer_engine'), not 2.9"
    ]
    assert report["versions"]["nemo"] == "2.7.3"
    assert report["versions"]["megatron.core"] == "0.15.3"
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("version", "wanted", "same"),
    [
        ("2.9.0+70f53666", "2.9", True),
        ("2.9", "2.9", True),
        ("2.90.0", "2.9", False),
        ("1.3.8", "1.3.8", True),
        ("1.3.80", "1.3.8", False),
        ("missing (ImportError: x)", "2.9", False),
    ],
)
def test_a_version_is_wanted_when_it_starts_with_its_numbers(smoke, version, wanted, same):
    assert smoke.matches(version, wanted) is same


def test_a_wrong_version_and_a_missing_name_are_complaints(smoke, monkeypatch):
    monkeypatch.setattr(smoke, "USED", {"json": ("loads", "no_such_name"), "no_such_module": ()})
    found, problems = smoke.inspect({"numpy": "9.9", "python": "3.11"})
    assert found["python"].startswith("3.11.")
    assert problems == [
        f"numpy is {found['numpy']}, not 9.9",
        "json has no no_such_name",
        "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    ]


def test_the_versions_of_this_machine_are_found_and_those_missing_are_said(smoke):
    found = smoke.image_versions()
    assert found["python"].startswith("3.11.")
    assert found["torch"].startswith("2.13.0")
    assert set(found) == set(TESTED_VERSIONS) - {"driver"}
    problems = [problem.split(".")[0] for problem in smoke.image_problems(found)]
    assert f"Python is {found['python'].rpartition('.')[0].split('.')[0]}" in problems
    assert "Transformer Engine is not there" in problems
    assert "TRITON_CACHE_DIR is not set, and its library would choose a folder itself" in problems


def test_an_image_with_the_tested_versions_has_no_problem(smoke, monkeypatch, tmp_path):
    for name in smoke.CACHES:
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    found = {name: bounds.tested for name, bounds in TESTED_VERSIONS.items() if name != "driver"}
    assert smoke.image_problems(found) == []
    assert smoke.untested(found) == []


def test_a_version_within_the_bounds_is_named_as_untested(smoke):
    assert smoke.untested({"torch": "2.11.0+cu130", "cudnn": "9.13.1", "apex": None}) == [
        "torch is 2.11.0+cu130; tested is 2.10.0a0"
    ]


def test_two_folders_of_cudnn_are_a_problem_and_one_is_none(smoke):
    base, ours = Path("/usr/lib/x86_64-linux-gnu"), Path("/opt/cudnn/lib")
    assert smoke.mixed_cudnn([ours / "libcudnn.so.9", ours / "libcudnn_graph.so.9"]) == []
    assert smoke.mixed_cudnn([ours / "libcudnn.so.9", base / "libcudnn_graph.so.9"]) == [
        "cuDNN is loaded from /opt/cudnn/lib and /usr/lib/x86_64-linux-gnu. Its libraries must be of one release."
    ]


def test_a_cache_that_cannot_be_written_is_named_with_the_uid(smoke, tmp_path):
    (tmp_path / "file").touch()
    caches = {name: str(tmp_path) for name in smoke.CACHES} | {"HF_HOME": str(tmp_path / "file")}
    assert smoke.unwritable_caches(caches) == [
        f"HF_HOME={tmp_path / 'file'} cannot be written by uid {os.getuid()}: File exists"
    ]
