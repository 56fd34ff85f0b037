"""Megatron's optimizer step with a question before it: whether the step may be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

StepResult = tuple[bool, float | None, int | None]


def gate_step(optimizer: Any, allows: Callable[[float], bool]) -> None:
    """Have an optimizer ask before every step; one that is not allowed changes neither weights nor optimizer state.

    Megatron offers no hook between the gradient norm and the update.

    Args:
        optimizer: Megatron's.
        allows: Called with the norm of the gradient of the global batch, before clipping.
    """
    step = optimizer.step

    def step_if_allowed() -> StepResult:
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if allows(grad_norm):
            result: StepResult = step()
            return result
        return False, grad_norm, None

    optimizer.step = step_if_allowed
