"""The quick check on a machine without a network: one archive of wheels, one command."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.hopper.pack_site import pack
from nemo_prolong.errors import DataError

ROOT = Path(__file__).parents[2]

PYTHON = f"""\
#!{sys.executable}
import os, sys, sysconfig
if sys.argv[1:3] == ["-m", "benchmarks.hopper"]:
    import carried
    print(os.getcwd(), *sys.argv[3:], carried.NAME, os.environ["TORCH_CUDA_ARCH_LIST"])
    print(*sorted(os.listdir(os.environ["CUDA_HOME"] + "/lib64")))
    print(os.path.realpath(os.environ["CUDA_HOME"] + "/bin"))
    sys.exit(1)
if sys.argv[1] == "-c":
    print(os.environ["PACKAGES"])
else:
    del sys.argv[0]
    exec(sys.stdin.read())
"""


def wheel(folder: Path, name: str, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_of_all_folders_become_one_archive(tmp_path: Path) -> None:
    wheel(tmp_path / "a", "carried", **{"carried/__init__.py": "NAME = 1", "carried-1.0.data/scripts/run": "x"})
    wheel(tmp_path / "b", "other", **{"carried/extension.so": "y", "tests/test_other.py": ""})
    archive = tmp_path / "site.tar.xz"
    assert pack(archive, [tmp_path / "a", tmp_path / "b"], ["tests/*"]) == archive.stat().st_size
    with tarfile.open(archive) as packed:
        assert [name for name in packed.getnames() if "." in name[2:]] == [
            "./carried/__init__.py",
            "./carried/extension.so",
        ]


def test_wheels_that_cannot_be_packed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"a: there are no wheels in it\. Download some with pip download\.$"):
        pack(tmp_path / "site.tar.xz", [tmp_path / "a"])
    wheel(tmp_path / "a", "x", **{"x-1.0.data/purelib/x.py": ""})
    with pytest.raises(DataError, match=r"whl: x-1\.0\.data/purelib/x\.py has to be installed\. Name a wheel without"):
        pack(tmp_path / "site.tar.xz", [tmp_path / "a"])


def test_one_command_unpacks_sets_the_environment_and_runs_the_check(tmp_path: Path) -> None:
    wheel(tmp_path / "a", "carried", **{"carried.py": "NAME = 'carried'"})
    pack(tmp_path / "site.tar.xz", [tmp_path / "a"])
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for folder, name in (
        ("cuda/lib64", "libcudart.so"),
        ("cuda/bin", "nvcc"),
        ("site/nvidia/cu13/lib", "libcublas.so.13"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    result = subprocess.run(
        ["bash", str(ROOT / "benchmarks/hopper/visit.sh"), "site.tar.xz", "output", "--cases", "te"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "PYTHON": str(python),
            "PACKAGES": str(tmp_path / "site"),
            "CUDA_HOME": str(tmp_path / "cuda"),
        },
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 1, result.stderr
    command, libraries, programs = result.stdout.splitlines()
    root, quick, seconds, left, *rest = command.split()
    assert (root, quick, seconds) == (str(ROOT), "--quick", "--seconds") and 500 < int(left) <= 540
    card = f"{tmp_path}/output/hopper_quick.json"
    assert rest == ["--json", card, "--cases", "te", "carried", "9.0"]
    assert (libraries, programs) == ("libcublas.so.13 libcudart.so", str(tmp_path / "cuda/bin"))
    assert (tmp_path / "output/log").read_text() == result.stdout
