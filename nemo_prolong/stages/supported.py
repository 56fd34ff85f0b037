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
        ConfigError: For context parallelism, sequence parallelism, FP8 or the Transformer Engine backend.
    """
    parallelism, precision = cfg.parallelism, cfg.precision
    if parallelism.context_parallel_size > 1:
        raise ConfigError(
            f"parallelism.context_parallel_size={parallelism.context_parallel_size}",
            "this version keeps every document on one rank.",
            "Set parallelism.context_parallel_size=1.",
        )
    if parallelism.sequence_parallel:
        raise ConfigError(
            "parallelism.sequence_parallel=true",
            "the torch layers of this version do not split norms over tensor-parallel ranks.",
            "Set parallelism.sequence_parallel=false.",
        )
    if precision.compute not in ("fp32", "bf16") or precision.backend == "te":
        raise ConfigError(
            f"precision.compute={precision.compute} precision.backend={precision.backend}",
            "this version computes in fp32 or bf16 with the torch backend.",
            "Set precision=bf16 precision.backend=torch.",
        )
