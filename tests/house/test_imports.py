"""The rooms that run on a login node: no torch, and the import direction of docs/architecture.md."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "megatron", "nemo", "transformers", "datasets", "pandas"}
LIGHT_ROOMS = ["config", "plan", "launch", "report", "doctor"]


def modules_of(room: str) -> list[str]:
    """Return the dotted names of every module in a room."""
    files = sorted((ROOT / "nemo_prolong" / room).rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


def loaded_by(modules: list[str]) -> set[str]:
    """Return the top-level names in ``sys.modules`` after a fresh interpreter imported ``modules``."""
    program = f"import sys, {', '.join(modules)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_package_imports_only_the_standard_library():
    foreign = loaded_by(["nemo_prolong"]) - loaded_by(["json"]) - set(sys.stdlib_module_names)
    assert foreign == {"nemo_prolong"}


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_no_module_of_a_light_room_loads_torch(room):
    modules = modules_of(room)
    assert modules, f"nemo_prolong/{room} has no modules"
    assert loaded_by(modules) & HEAVY == set()


def test_the_words_everyone_uses_load_no_torch():
    modules = ["nemo_prolong.errors", "nemo_prolong.files", "nemo_prolong.logs", "nemo_prolong.units"]
    assert loaded_by(modules) & HEAVY == set()


def test_imports_go_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_importing_the_engine_loads_none_of_its_libraries():
    assert loaded_by(["nemo_prolong.engine"]) & {*HEAVY, "modelopt"} == set()
