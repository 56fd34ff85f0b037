"""A decision between the gradients of a step and the step itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nemo_prolong.engine.patches.patch import MEGATRON, Patch

StepResult = tuple[bool, float | None, int | None]
"""What Megatron's ``step`` returns: whether it stepped, gradient norm, number of zeros in the gradient."""


def gate_step(optimizer: Any, allows: Callable[[float], bool]) -> None:
    """Ask before every step of an optimizer whether to take it.

    A step that is left out changes neither weights nor optimizer state and returns ``(False, grad_norm, None)``.

    Args:
        optimizer: A Megatron optimizer: ``optimizer.mcore_optimizer`` of those of a NeMo trainer.
        allows: Called on every rank with the norm of the gradients of all parameters, reduced over ranks and not
            clipped. It must answer the same on all of them.
    """
    optimizer.step = functools.partial(_step_if_allowed, optimizer, optimizer.step, allows)


def _step_if_allowed(optimizer: Any, step: Callable[[], StepResult], allows: Callable[[float], bool]) -> StepResult:
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    return step() if allows(grad_norm) else (False, grad_norm, None)


PATCH = Patch(
    "optimizer_step",
    "Megatron takes every step and offers no place to look at the gradient norm before it: a NaN would be in the "
    "weights of all ranks",
    gate_step,
    MEGATRON,
    after_import=True,
    with_gpu=True,
    per_object=True,
)
