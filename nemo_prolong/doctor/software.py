"""Versions of what is installed, found without importing it; torch is asked in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement

from nemo_prolong.doctor.facts import TorchFacts
from nemo_prolong.doctor.nvidia import RunCommand
from nemo_prolong.doctor.probing import ProbeError

_ASK_TORCH = """
import json, torch
available = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if available else None,
    "nccl": torch.cuda.nccl.version() if available else None,
    "devices": torch.cuda.device_count() if available else 0,
}))
"""


DISTRIBUTIONS = {
    "transformer_engine": "transformer-engine",
    "flash_attn": "flash-attn",
    "flash_attn_3": "flash-attn-3",
    "apex": "apex",
    "torch": "torch",
}
"""Packages that no requirement names, because an image brings them, and the names they are installed under."""

_OURS = "nemo-prolong"


@dataclass(frozen=True)
class Packages:
    """What is installed, and what is asked for.

    Attributes:
        versions: By name; None where a package is not installed.
        requirements: What this package asks for, by the name of each package; empty where it is not installed itself.
    """

    versions: dict[str, str | None]
    requirements: dict[str, str]


def read_packages() -> Packages:
    """Return the versions of everything that this package asks for, and of the components of its image."""
    requirements = _requirements()
    versions = {name: _version(name) for name in requirements}
    return Packages(versions | {name: _version(package) for name, package in DISTRIBUTIONS.items()}, requirements)


def _requirements() -> dict[str, str]:
    found = {}
    try:
        lines = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        # Those of an extra are for tests.
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name] = line
    return found


def ask_torch(run: RunCommand) -> TorchFacts | None:
    """Return what torch says of its libraries, or None where it is not installed.

    It is asked in a process of its own, because a broken driver can end or hang whoever initializes CUDA.

    Raises:
        ProbeError: If it cannot be imported, or does not answer.
    """
    if _version("torch") is None:
        return None
    printed = run((sys.executable, "-c", _ASK_TORCH))
    try:
        said = json.loads((printed or "").strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ProbeError(f"torch says {printed!r} of its libraries") from error
    return TorchFacts(
        version=said["version"],
        cuda=release(said["cuda"]),
        cudnn=cudnn_release(said["cudnn"]),
        nccl=tuple(said["nccl"]) if said["nccl"] else None,
        devices=said["devices"],
    )


def release(version: str | None) -> tuple[int, ...] | None:
    """Return the numbers that a version begins with.

    >>> release("2.9.0+70f53666"), release("12.8"), release(None)
    ((2, 9, 0), (12, 8), None)
    """
    match = re.match(r"\d+(?:\.\d+)*", version or "")
    return tuple(map(int, match[0].split("."))) if match else None


def cudnn_release(number: int | None) -> tuple[int, ...] | None:
    """Return a number of cuDNN 9 as its release.

    >>> cudnn_release(91800), cudnn_release(None)
    ((9, 18, 0), None)
    """
    return (number // 10_000, number // 100 % 100, number % 100) if number else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
