"""The locks hold what pyproject.toml asks for, with a hash each, and the environment is the one they describe."""

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from nemo_prolong.config.tested_versions import TESTED_VERSIONS

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ["bootstrap.lock", "cpu.lock", "gpu-py312.lock", "interop.lock", "transformers5.lock", "launch.lock"]
CONTAINERS_OWN = ("torch", "triton", "transformer-engine", "apex", "flash-attn")


def normalized(name: str) -> str:
    """Return a distribution's name as the locks spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lines: list[str]) -> dict[str, str]:
    """Return name -> version of every ``name==version`` among ``lines``."""
    found = [re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line) for line in lines]
    return {normalized(match[1]): match[2] for match in found if match}


def locked(lock: str) -> dict[str, str]:
    """Return name -> version of a lock."""
    return pins((REQUIREMENTS / lock).read_text().splitlines())


def complaints_expected() -> set[str]:
    """Return the lines of known-conflicts.txt that are no comment."""
    lines = (REQUIREMENTS / "known-conflicts.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = pins(PROJECT["dependencies"])
TEST = pins(PROJECT["optional-dependencies"]["test"])
DEV = pins(PROJECT["optional-dependencies"]["dev"])


def test_every_direct_dependency_but_torch_is_pinned():
    unpinned = [line for line in PROJECT["dependencies"] if "==" not in line]
    assert [line.split(">=")[0] for line in unpinned] == ["torch"]


@pytest.mark.parametrize(
    ("lock", "direct"), [("cpu.lock", RUNTIME | TEST | DEV), ("gpu-py312.lock", RUNTIME | TEST)], ids=["cpu", "gpu"]
)
def test_every_direct_dependency_is_locked_at_its_pin(lock, direct):
    versions = locked(lock)
    assert {name: versions.get(name) for name in direct} == direct


def test_both_platforms_run_the_same_versions():
    cpu, gpu = locked("cpu.lock"), locked("gpu-py312.lock")
    assert {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == {}


@pytest.mark.parametrize("lock", [*LOCKS, "te.lock", "image.lock", "image-tools.lock"])
def test_every_pin_has_a_hash_and_no_line_names_a_host(lock):
    text = (REQUIREMENTS / lock).read_text()
    entries = re.split(r"\n(?=[a-z0-9])", text)[1:]
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert re.findall(r"https?://|--(?:extra-)?index|--find-links", text) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_holds_what_the_platform_brings(lock):
    foreign = [name for name in locked(lock) if name in CONTAINERS_OWN or re.match(r"nvidia-cu|nvidia-nccl", name)]
    assert foreign == []


def test_the_image_brings_the_cudnn_of_the_tested_versions():
    version = locked("image.lock")["nvidia-cudnn-cu13"]
    assert TESTED_VERSIONS["cudnn"].is_tested(version.rpartition(".")[0])


def test_hydra_is_the_release_that_closes_the_hole():
    assert locked("cpu.lock")["hydra-core"] == locked("gpu-py312.lock")["hydra-core"] == "1.3.8"
    assert importlib.metadata.version("hydra-core") == "1.3.8"


def test_numpy_stays_below_2_which_megatron_asks_for():
    assert locked("cpu.lock")["numpy"].startswith("1.26.")


def test_what_is_installed_is_what_is_locked():
    # Not all of sys.path: setuptools, once imported, puts its own copies of some of these there.
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {normalized(distribution.metadata["Name"]): distribution.version for distribution in found}
    wrong = {name: (installed.get(name), pin) for name, pin in locked("cpu.lock").items() if installed.get(name) != pin}
    assert wrong == {}, "the environment is not the one of the lock; run: make clean setup"


def test_torch_is_the_release_of_its_requirements_file():
    (version,) = pins((REQUIREMENTS / "torch.txt").read_text().splitlines()).values()
    assert importlib.metadata.version("torch").split("+")[0] == version


def test_pip_check_complains_of_known_conflicts_only():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert set(result.stdout.splitlines()) == complaints_expected(), "a fresh environment has these: make clean setup"


def test_every_known_conflict_is_dropped_by_the_overrides():
    dropped = set(re.findall(r"^([a-z-]+) ;", (REQUIREMENTS / "overrides.txt").read_text(), flags=re.MULTILINE))
    missing = {re.search(r"requires ([a-z-]+), which is not installed", line)[1] for line in complaints_expected()}
    assert missing == dropped - {"torch"}
