"""RoPE with sines and cosines that the model computed once, where Megatron computes them in every layer."""

from __future__ import annotations

from typing import Any

import torch

from nemo_prolong.engine.patches.patch import MEGATRON, Patch, replace


def _take_factors() -> None:
    """Put a function before Megatron's that knows what our model hands to the layers."""
    from megatron.core.transformer import attention

    from nemo_prolong.ops.rotary import rotate

    megatrons = attention.apply_rotary_pos_emb

    def apply(heads: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rotate by the factors of ``ops.rotary``, which have one dim more than angles."""
        if freqs.dim() == heads.dim() + 1:
            return rotate(heads, freqs)
        result: torch.Tensor = megatrons(heads, freqs, *args, **kwargs)
        return result

    replace(attention, "apply_rotary_pos_emb", apply)()


PATCH = Patch(
    "rotary",
    "Megatron takes sine and cosine of every angle for queries and for keys, in each layer and again when it "
    "recomputes; our model takes them once per forward pass",
    _take_factors,
    MEGATRON,
    after_import=True,
    with_gpu=True,
)
