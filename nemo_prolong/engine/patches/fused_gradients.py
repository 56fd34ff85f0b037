"""Gradient accumulation fusion of Transformer Engine, without apex."""

from __future__ import annotations

from nemo_prolong.engine.patches.patch import MEGATRON, Patch, replace


def _build_the_head_without_apex() -> None:
    from megatron.core.tensor_parallel import layers

    replace(layers, "_grad_accum_fusion_available", True)()


PATCH = Patch(
    "fused_gradients",
    "Megatron's LM head refuses gradient accumulation fusion where apex's kernel is missing. The layers of Transformer "
    "Engine have their own, and the product of our head is not Megatron's. What needs apex's kernel is refused earlier",
    _build_the_head_without_apex,
    MEGATRON,
    after_import=True,
    with_gpu=True,
)
