"""Which kernels a model is built with: torch's or Transformer Engine's."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from packaging.version import Version

from nemo_prolong.config import legality
from nemo_prolong.config.schema import KernelBackend, PrecisionConfig
from nemo_prolong.errors import ConfigError

_DISTRIBUTIONS = ("transformer-engine", "transformer_engine")


def installed_version() -> str | None:
    """Return the version of Transformer Engine in this environment without importing it; None where there is none."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def resolve_backend(precision: PrecisionConfig) -> KernelBackend:
    """Return the backend of a model here: ``torch`` or ``te``, never ``auto``.

    ``auto`` is Transformer Engine on a GPU where it is installed, else torch; fp32 is always torch, because no
    attention kernel of Transformer Engine takes packed rows in it, and FP8 is always Transformer Engine.

    Raises:
        ConfigError: If Transformer Engine is wanted and not installed.
    """
    version = installed_version()
    platform = legality.Platform(
        transformer_engine=Version(version).release if version else None,
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
    )
    backend = legality.resolve_backend(precision, platform)
    if backend is KernelBackend.TE and version is None:
        raise ConfigError(
            f"precision.compute={precision.compute} precision.backend={precision.backend}",
            "Transformer Engine is not installed here.",
            "Set precision=bf16 precision.backend=torch, or run in the container of the Dockerfile.",
        )
    return backend
