"""A file system over that of this machine: programs in it see this machine, and write into a folder of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class Rootfs:
    """An overlay on ``/``, in which commands run by chroot. It takes root and a mount namespace of its own.

    Args:
        folder: Where the layers lie, on a file system that can hold them (ext4 or xfs, no overlay).
        layer: Name of the layer that is written.
        below: What it lies over: ``/``, or the ``path`` of another that is mounted.
    """

    def __init__(self, folder: Path, layer: str, below: Path = Path("/")) -> None:
        self.path = folder / f"{layer}.mounted"
        upper, work = folder / layer, folder / f"{layer}.work"
        for made in (self.path, upper, work):
            made.mkdir(parents=True, exist_ok=True)
        options = f"lowerdir={below},upperdir={upper},workdir={work}"
        _call("mount", "-t", "overlay", "overlay", "-o", options, str(self.path))
        for kernel in ("proc", "dev"):
            _call("mount", "--rbind", f"/{kernel}", str(self.path / kernel))

    def close(self) -> None:
        """Unmount it; the layers stay."""
        _call("umount", "--recursive", str(self.path))

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: str = "/", user: str = "0"
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it and return what became of it.

        Args:
            command: The program and its arguments.
            environment: Its whole environment.
            folder: Where it starts.
            user: Numeric uid; its gid is that of the entry in /etc/passwd, or the same number.
        """
        chroot = [str(shutil.which("chroot")), str(self.path)]
        drop = ["setpriv", f"--reuid={user}", f"--regid={self._group(user)}", "--clear-groups"] if user != "0" else []
        return subprocess.run(
            [*chroot, *drop, "env", f"--chdir={folder}", *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def copy(self, root: Path, names: Sequence[str], target: str) -> None:
        """Copy files of ``root`` to a folder in it, as root and readable for all."""
        for name in names:
            copied = self.path / target.lstrip("/") / name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copied)

    def _group(self, user: str) -> str:
        entries = (line.split(":") for line in (self.path / "etc/passwd").read_text().splitlines())
        return next((entry[3] for entry in entries if entry[2] == user), user)


def _call(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {result.stderr.strip()}. This takes root and overlay mounts.")
