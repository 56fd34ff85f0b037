"""Which kernels a model is built with: torch's or Transformer Engine's."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

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
    """Return the backend of a model: ``torch`` or ``te``, never ``auto``.

    ``auto`` is Transformer Engine on a GPU where it is installed, else torch; fp32 is always torch, because no
    attention kernel of Transformer Engine takes packed rows in it.

    Raises:
        ConfigError: If the format and the backend do not fit, or Transformer Engine is asked for and not installed.
    """
    backend = precision.backend
    if backend is KernelBackend.AUTO:
        usable = precision.compute != "fp32" and torch.cuda.is_available() and installed_version() is not None
        backend = KernelBackend.TE if usable else KernelBackend.TORCH
    if backend is KernelBackend.TE:
        _check_te(precision)
    elif precision.compute.startswith("fp8"):
        raise ConfigError(
            f"precision.compute={precision.compute}",
            "FP8 needs Transformer Engine on a GPU; the torch backend computes in fp32 or bf16.",
            "Set precision=bf16, or run where Transformer Engine 2.9 is installed.",
        )
    return backend


def _check_te(precision: PrecisionConfig) -> None:
    if installed_version() is None:
        raise ConfigError(
            f"precision.backend={precision.backend}",
            "Transformer Engine is not installed in this environment.",
            "Set precision.backend=torch, or run in the container of the Dockerfile.",
        )
    if precision.compute == "fp32":
        raise ConfigError(
            "precision.compute=fp32",
            "no attention kernel of Transformer Engine takes rows with document masks in fp32.",
            "Set precision=bf16, or precision.backend=torch.",
        )
