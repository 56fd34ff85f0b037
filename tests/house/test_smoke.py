"""docker/smoke.py: what is installed here passes, and each kind of fault is named."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    command += ["--expect", "python=3.11", "--expect", "transformer_engine=2.9", "--at-least", "torch=2.10"]
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


@pytest.mark.parametrize(
    ("version", "enough"),
    [("2.9.0a0+50eac811a6.nv25.9", True), ("2.13.0+cpu", True), ("2.8.0", False), ("missing (x)", False)],
)
def test_a_lower_bound_is_compared_as_a_version_not_as_text(smoke, version, enough):
    assert smoke.is_at_least(version, "2.9.0a0") is enough


def test_a_wrong_version_and_a_missing_name_are_complaints(smoke, monkeypatch):
    monkeypatch.setattr(smoke, "USED", {"json": ("loads", "no_such_name"), "no_such_module": ()})
    found, problems = smoke.inspect({"numpy": "9.9", "python": "3.11"}, {"yaml": "99"})
    assert found["python"].startswith("3.11.")
    assert problems == [
        f"numpy is {found['numpy']}, not 9.9",
        f"yaml is {found['yaml']}, below 99",
        "json has no no_such_name",
        "no_such_module cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    ]
