"""Run the steps of the Dockerfile over this machine, and the image as another user, without a container engine.

    python -m tests.image --python /path/to/python3.12 --te-extension transformer_engine_torch-2.9.0-....whl

In place of the base image stand this machine's file system, a Python 3.12, the CUDA build of torch with its libraries,
Transformer Engine (``requirements/te.lock``) and an empty entrypoint. Each instruction is read from the Dockerfile and
carried out in a chroot on an overlay, RUN by its own shell. So this shows that the steps run, that the lock installs by
hash over such a base, and that another uid can use the result. It does not show what NVIDIA's packages do to it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.image.dockerfile import Instruction, assignments, context, instructions, substituted
from tests.image.rootfs import Rootfs

ROOT = Path(__file__).parents[2]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK = ("PIP_", "SSL_CERT", "REQUESTS_CA", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy")
ANYONE = "4242"
"""A uid that no /etc/passwd has."""

SMOKE = ["docker/smoke.py", "--lock", "requirements/gpu-py312.lock", "--image"]
CHECKS: dict[str, list[str]] = {
    "the smoke test passes": ["python", *SMOKE],
    "ranks of torchrun have the packages of the lock": ["torchrun", "--nproc-per-node", "1", *SMOKE],
    "the user has a name": ["python", "-c", "import getpass; print(getpass.getuser())"],
    "a stage is composed": ["python", "scripts/train.py", "+exp=stage2", "--cfg", "job"],
    "make gpu-check runs": ["make", "gpu-check", "GPU_CHECK_ARGS=--device cpu --stages attention"],
    "its card can be written": ["touch", "docs/verification/written", "runs/written", "data/written"],
}
"""What is shown -> the command of the container, run through its entrypoint as ``ANYONE``."""


# An interpreter below root's home is the base's, so every user must reach it.
STAND_IN = """
ln -sf {python} /usr/local/bin/python
ln -sf {python} /usr/local/bin/python3
for folder in $(python -c 'import pathlib, sys; print(*pathlib.Path(sys.base_prefix).parents)'); do
  chmod a+x "$folder"
done
install="python -m pip install -q --no-deps --no-compile --ignore-installed"
$install --require-hashes -r /te.lock
nvidia=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
ln -sfn lib "$nvidia/cu13/lib64"
ln -sf libcudart.so.13 "$nvidia/cu13/lib/libcudart.so"
$install {extension}
ln -sfn "$nvidia/cu13" /usr/local/cuda
mkdir -p /opt/nvidia
printf '#!/bin/bash\\nexec "$@"\\n' > /opt/nvidia/nvidia_entrypoint.sh
chmod +x /opt/nvidia/nvidia_entrypoint.sh
"""
"""What is done to the file system of this machine to make it stand for the base image."""


class Build:
    """Carries out instructions one after the other, as a container engine would.

    Args:
        rootfs: The file system.
        environment: What the base has set.
        network: Variables that pip and others need on this machine to reach the packages.
    """

    def __init__(self, rootfs: Rootfs, environment: Mapping[str, str], network: Mapping[str, str]) -> None:
        self.rootfs = rootfs
        self.environment = dict(environment)
        self.network = dict(network)
        self.arguments: dict[str, str] = {}
        self.folder, self.user, self.shell, self.entrypoint = "/", "0", ["/bin/sh", "-c"], list[str]()

    def do(self, instruction: Instruction) -> None:
        """Carry out one instruction."""
        handlers: dict[str, Callable[[str], None]] = {
            "ARG": self._arg,
            "CMD": lambda text: None,
            "COPY": self._copy,
            "ENTRYPOINT": lambda text: self.entrypoint.extend(json.loads(text)),
            "ENV": lambda text: self.environment.update(assignments(text, self._variables)),
            "FROM": lambda text: None,
            "LABEL": lambda text: None,
            "RUN": self._run,
            "SHELL": lambda text: setattr(self, "shell", json.loads(text)),
            "USER": lambda text: setattr(self, "user", substituted(text, self._variables)),
            "WORKDIR": self._workdir,
        }
        handlers[instruction.name](instruction.text)

    def start(self, command: list[str], user: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the container as ``docker run --user`` does."""
        return self.rootfs.run([*self.entrypoint, *command], self.environment, self.folder, user)

    @property
    def _variables(self) -> dict[str, str]:
        return self.arguments | self.environment

    def _arg(self, text: str) -> None:
        self.arguments |= assignments(text, self._variables)

    def _copy(self, text: str) -> None:
        source, target = substituted(text, self._variables).split()
        names = [name for name in context(ROOT) if source == "." or name.startswith(f"{source}/")]
        below = target if source == "." else str(Path(target).parent)
        self.rootfs.copy(ROOT, names, str(Path(self.folder) / below))

    def _run(self, text: str) -> None:
        result = self.rootfs.run([*self.shell, text], self.network | self._variables, self.folder, user=self.user)
        if result.returncode:
            raise SystemExit(f"error: RUN {text}\nended with {result.returncode}:\n{result.stdout}{result.stderr}")

    def _workdir(self, text: str) -> None:
        self.folder = substituted(text, self._variables)
        (self.rootfs.path / self.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)


def stand_in(folder: Path, python: Path, extension: Path, environment: dict[str, str]) -> None:
    """Make the layer that stands for the base image, unless it is there: torch and what belongs to it."""
    lock = ROOT / "requirements" / "te.lock"
    made_of = hashlib.sha256(lock.read_bytes() + f"{python} {extension}".encode()).hexdigest()
    stamp = folder / "base.made_of"
    if stamp.exists() and stamp.read_text() == made_of:
        return
    for layer in ("base", "base.work"):
        shutil.rmtree(folder / layer, ignore_errors=True)
    rootfs = Rootfs(folder, "base")
    try:
        rootfs.copy(lock.parent, [lock.name], "/")
        script = STAND_IN.format(python=python, extension=extension)
        result = rootfs.run(["bash", "-euc", script], environment)
    finally:
        rootfs.close()
    if result.returncode:
        raise SystemExit(f"error: the stand-in of the base image:\n{result.stdout}{result.stderr}")
    stamp.write_text(made_of)


def build_and_check(folder: Path, python: Path, extension: Path) -> int:
    """Build over a fresh layer, run the checks, and return how many failed."""
    network = {name: value for name, value in os.environ.items() if name.startswith(NETWORK)}
    system = {"PATH": f"/usr/local/cuda/bin:{SYSTEM_PATH}", "PIP_BREAK_SYSTEM_PACKAGES": "1", "LANG": "C.UTF-8"}
    folder.mkdir(parents=True, exist_ok=True)
    timed("stand-in of the base", lambda: stand_in(folder, python, extension, network | system))
    for layer in ("image", "image.work"):
        shutil.rmtree(folder / layer, ignore_errors=True)
    base = Rootfs(folder, "base")
    rootfs = Rootfs(folder, "image", below=base.path)
    try:
        build = Build(rootfs, {"PATH": system["PATH"], "LANG": "C.UTF-8"}, network)
        for instruction in instructions((ROOT / "Dockerfile").read_text()):
            timed(str(instruction)[:100], functools.partial(build.do, instruction))
        return sum(not passes(build, *check) for check in CHECKS.items())
    finally:
        rootfs.close()
        base.close()


def timed(title: str, action: Callable[[], None]) -> None:
    """Carry out an action and print how long it took."""
    began = time.monotonic()
    action()
    print(f"{time.monotonic() - began:6.1f} s  {title}", flush=True)


def passes(build: Build, title: str, command: list[str]) -> bool:
    """Run one check as a user without an entry in /etc/passwd; print its output where it fails."""
    result = build.start(command, ANYONE)
    print(f"{'failed' if result.returncode else 'passed':>8}  {title}", flush=True)
    if result.returncode or command == CHECKS["the smoke test passes"]:
        print(result.stdout[-4000:], result.stderr[-4000:] if result.returncode else "", flush=True)
    return result.returncode == 0


def main() -> int:
    """Run in a mount namespace of its own; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="a Python 3.12 of this machine")
    parser.add_argument("--te-extension", type=Path, required=True, help="a wheel of transformer-engine-torch")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-image", help="where the layers lie")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        return subprocess.call(["unshare", "--mount", sys.executable, "-m", "tests.image", *sys.argv[1:], "--inside"])
    failed = build_and_check(options.folder.resolve(), options.python.resolve(), options.te_extension.resolve())
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
