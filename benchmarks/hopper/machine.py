"""What a stage ran on: device, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from nemo_prolong.errors import ConfigError

_PACKAGES = (
    "nemo-toolkit",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "transformers",
    "nvidia-modelopt",
    "numpy",
)


def check_device(device: str) -> None:
    """Refuse a machine without a GPU.

    Raises:
        ConfigError: If ``device`` is a GPU and torch finds none.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {device}",
            f"torch {torch.__version__} finds no GPU here.",
            "Run it on an H100 or H200, or add --device cpu for small sizes.",
        )


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit as they are written next to the figures."""
    return {"machine": _machine(device), "versions": _versions(), "commit": commit()}


def _machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {"device": f"CPU ({platform.machine()})", "cpus": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            **_driver(properties.uuid),
        }
    return machine


def _driver(uuid: object) -> dict[str, str]:
    """Return the driver's version and the power limit, which bounds the speed of a GPU; none if the tool is missing."""
    names = ("driver_version", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return {}
    values = result.stdout.strip().split(", ")
    return dict(zip(("driver", "power_limit"), values, strict=True)) if result.returncode == 0 else {}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and torch.backends.cudnn.version():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> str:
    """Return the commit that is measured; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()
