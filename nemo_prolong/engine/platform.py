"""What this process runs on, for the rules of ``config.rules.constraints``."""

from __future__ import annotations

import torch
from packaging.version import Version

from nemo_prolong.config.rules.constraints import Platform
from nemo_prolong.engine.te.backend import installed_version


def current_platform() -> Platform:
    """Return versions and device; Transformer Engine is looked up, not imported."""
    has_gpu = torch.cuda.is_available()
    return Platform(
        transformer_engine=_release(installed_version()),
        compute_capability=torch.cuda.get_device_capability(0) if has_gpu else None,
        cudnn=_cudnn_release(torch.backends.cudnn.version()) if has_gpu else None,
        cuda=_release(torch.version.cuda),
    )


def _release(version: str | None) -> tuple[int, ...] | None:
    return Version(version).release if version else None


def _cudnn_release(number: int | None) -> tuple[int, int, int] | None:
    """Return 91002 as (9, 10, 2)."""
    return (number // 10_000, number // 100 % 100, number % 100) if number else None
