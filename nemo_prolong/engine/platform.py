"""What this process runs on, for the rules of ``config.rules.constraints``."""

from __future__ import annotations

import importlib.metadata

import torch
from packaging.version import Version

from nemo_prolong.config.rules.attention import Platform


def current_platform() -> Platform:
    """Return versions and device; nothing but torch is imported."""
    has_gpu = torch.cuda.is_available()
    return Platform(
        transformer_engine=_release(transformer_engine_version()),
        compute_capability=torch.cuda.get_device_capability(0) if has_gpu else None,
        cudnn=_cudnn_release(torch.backends.cudnn.version()) if has_gpu else None,
        cuda=_release(torch.version.cuda),
        flash_attn=_release(_installed("flash-attn")),
        flash_attn_3=_release(_installed("flash-attn-3")),
    )


def transformer_engine_version() -> str | None:
    """Return the version of Transformer Engine in this environment, found without importing it; None without it."""
    return _installed("transformer-engine")


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str | None) -> tuple[int, ...] | None:
    return Version(version).release if version else None


def _cudnn_release(number: int | None) -> tuple[int, int, int] | None:
    """Return 91002 as (9, 10, 2)."""
    return (number // 10_000, number // 100 % 100, number % 100) if number else None
