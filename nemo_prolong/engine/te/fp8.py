"""FP8 in the words of Megatron and NeMo.

Matrix products run in FP8 by the recipe of the configuration. Attention runs in BF16 unless ``fp8_attention`` asks for
FP8 where a row needs no document mask. Weights stay in BF16 (no ``fp8_param_gather``): exports read them as they are.
"""

from __future__ import annotations

from typing import Any

from nemo import lightning as nl

from nemo_prolong.config.schema import PrecisionConfig

_AMAX_HISTORY_STEPS = 1024
"""Forward passes whose largest values delayed scaling remembers. With fewer, a row without FP8 attention between two
others would leave its scales to a single row."""


def is_fp8(precision: PrecisionConfig) -> bool:
    """Return whether matrix products run in FP8."""
    return precision.compute.startswith("fp8")


def fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the FP8 fields that Megatron's model configuration and NeMo's plugin share; none without FP8."""
    if not is_fp8(precision):
        return {}
    return {
        "fp8": "hybrid",
        "fp8_recipe": precision.fp8_recipe,
        "fp8_amax_history_len": _AMAX_HISTORY_STEPS,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": precision.compute == "fp8_attention",
        "fp8_multi_head_attention": False,
    }


def mixed_precision(precision: PrecisionConfig) -> nl.MegatronMixedPrecision:
    """Return NeMo's plugin for BF16 weights with FP32 master weights, with FP8 matrix products where asked for."""
    return nl.MegatronMixedPrecision(precision="bf16-mixed", fp8_param_gather=False, **fp8_fields(precision))
