"""The optimizer of the torch backend updates as torch's AdamW, with one step counter a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_prolong.ops.adam import GroupStepAdam

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), (2,))]


def set_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    """Give all but the last parameter a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_updates_are_those_of_adamw() -> None:
    ours, theirs = parameters(), parameters()
    groups = [
        {"params": ours[:1]},
        {"params": ours[1:], "lr": 0.02, "weight_decay": 0.0, "betas": (0.5, 0.6), "eps": 1.0},
    ]
    optimizer = GroupStepAdam(groups, **SETTINGS)
    reference = torch.optim.AdamW(
        [{**groups[0], "params": theirs[:1]}, {**groups[1], "params": theirs[1:]}], **SETTINGS
    )
    for seed in range(4):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        moments, expected = optimizer.state[mine], reference.state[other]
        assert sorted(moments) == ["exp_avg", "exp_avg_sq"]
        for name in moments:
            torch.testing.assert_close(moments[name], expected[name], rtol=1e-6, atol=1e-7)


def test_each_group_counts_the_steps_that_it_takes() -> None:
    first, _, last = parameters()
    optimizer = GroupStepAdam([{"params": [first]}, {"params": [last]}], **SETTINGS)
    # Whichever comes first.
    optimizer.param_groups.reverse()
    before = last.detach().clone()
    for seed in range(3):
        set_gradients([first, last], seed)
        optimizer.step()
    assert [group.get("step") for group in optimizer.param_groups] == [None, 3]
    assert torch.equal(last, before) and last not in optimizer.state
    last.grad = torch.ones_like(last)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 4]


def test_a_resumed_optimizer_goes_on_where_it_was() -> None:
    whole, half = parameters()[:2], parameters()[:2]
    optimizer = GroupStepAdam(whole, **SETTINGS)
    first = GroupStepAdam(half, **SETTINGS)
    for seed in range(2):
        for mine in (whole, half):
            set_gradients([*mine, mine[0]], seed)
        optimizer.step()
        first.step()
    resumed = GroupStepAdam(half, **{**SETTINGS, "lr": 9.0})
    resumed.load_state_dict(first.state_dict())
    for mine in (whole, half):
        set_gradients([*mine, mine[0]], 7)
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_a_decay_that_is_not_decoupled_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="the recipe uses decoupled weight decay"):
        GroupStepAdam(parameters(), **SETTINGS, adam_w_mode=False)
