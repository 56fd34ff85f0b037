"""What this version's engine cannot train yet, refused before NeMo is imported.

The configuration rules (``config/checks.py``) say what is right on an H100 cluster; this says what is built. Each entry
goes when the engine can do it.
"""

from __future__ import annotations

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError


def check_supported(cfg: RunConfig) -> None:
    """Refuse a stage that the engine cannot train.

    Raises:
        ConfigError: For FP8 or the Transformer Engine backend.
    """
    precision = cfg.precision
    if precision.compute not in ("fp32", "bf16") or precision.backend == "te":
        raise ConfigError(
            f"precision.compute={precision.compute} precision.backend={precision.backend}",
            "this version computes in fp32 or bf16 with the torch backend.",
            "Set precision=bf16 precision.backend=torch.",
        )
