"""The environment variables by which Transformer Engine is told which kernels of attention it may take.

Transformer Engine 2.9 reads them when attention runs (``get_attention_backend``), not when it is imported. Megatron sets
them when a model is built, from ``attention_backend``, and refuses to if they are set to something else.
"""

from __future__ import annotations

import os

from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.engine.platform import current_platform
from nemo_prolong.errors import ConfigError

_FLASH, _CUDNN, _UNFUSED = "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"
_ALLOWED = {"auto": {_FLASH, _CUDNN}, "cudnn": {_CUDNN}, "flash": {_FLASH}}
_NONDETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


def environment_findings(cfg: RunConfig) -> list[ConfigError]:
    """Return an error for every variable of the process that asks for other kernels than the configuration."""
    if resolve_backend(cfg.precision, current_platform()) is not KernelBackend.TE:
        return []
    found = []
    for name in (_FLASH, _CUDNN):
        if os.environ.get(name, "1") == "0" and name in _ALLOWED[cfg.precision.attention]:
            rule = f"takes away kernels that precision.attention={cfg.precision.attention} allows."
            remedy = f"Unset {name}, and set precision.attention={'flash' if name == _CUDNN else 'cudnn'}."
            found.append(ConfigError(f"{name}=0", rule, remedy))
    if os.environ.get(_NONDETERMINISTIC, "1") == "0" and not cfg.train.deterministic:
        rule = "asks Transformer Engine for deterministic kernels, and train.deterministic=false does not."
        remedy = f"Unset {_NONDETERMINISTIC}, or set train.deterministic=true."
        found.append(ConfigError(f"{_NONDETERMINISTIC}=0", rule, remedy))
    return found


def forget_kernels() -> None:
    """Forget what an earlier model of this process was built for, so that Megatron sets it anew."""
    for name in (_FLASH, _CUDNN, _UNFUSED):
        os.environ.pop(name, None)


def forbid_unfused_kernels() -> None:
    """Have Transformer Engine raise where no fast kernel fits: the slow one keeps the scores of whole rows."""
    os.environ[_UNFUSED] = "0"
