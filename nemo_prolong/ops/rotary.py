"""Rotary position embedding (RoPE) of queries and keys, with sines and cosines that are computed beforehand."""

from __future__ import annotations

import torch


def rotary_factors(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the cosines and sines of angles, for all layers of a forward pass.

    Args:
        angles: Of each token and channel, float32 [T, 1, C]; both halves of the channels have the same.
        dtype: Of queries and keys. Megatron rounds to it too, in every layer.

    Returns:
        [2, T, 1, C] in ``dtype``.
    """
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(heads: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return queries or keys with their position in them.

    Args:
        heads: [T, H, C]; channel i and i + C / 2 are a pair.
        factors: See ``rotary_factors``.
    """
    cosines, sines = factors.to(heads.dtype).unbind()
    first, second = heads.chunk(2, dim=-1)
    rotated: torch.Tensor = heads * cosines + torch.cat((-second, first), dim=-1) * sines
    return rotated
