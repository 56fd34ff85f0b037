"""RoPE with sines and cosines that are computed once, against Megatron's formula in every layer."""

from __future__ import annotations

import pytest
import torch

from nemo_prolong.ops.rotary import rotary_factors, rotate


def in_every_layer(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Return what Megatron's layer makes of queries or keys."""
    first, second = torch.chunk(heads, 2, dim=-1)
    cosines, sines = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_one_forward_pass_give_the_bits_of_every_layer(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, channels = 37, 16
    frequencies = 1e4 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.outer(torch.arange(tokens) * 1000.0, frequencies).repeat(1, 2)[:, None]
    heads = torch.randn(tokens, 3, channels, generator=generator).to(dtype)
    ours, theirs = heads.clone().requires_grad_(), heads.clone().requires_grad_()
    factors = rotary_factors(angles, dtype)
    assert factors.shape == (2, tokens, 1, channels) and factors.dtype == dtype
    output, expected = rotate(ours, factors), in_every_layer(theirs, angles)
    assert output.dtype == dtype and torch.equal(output, expected)
    weight = torch.randn(heads.shape, generator=generator).to(dtype)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_position_zero_is_left_as_it_is() -> None:
    heads = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(heads, rotary_factors(torch.zeros(1, 1, 8), torch.float32)), heads)
