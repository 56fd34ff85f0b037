"""The optimizer's state in a save that comes before its first step."""

from __future__ import annotations

from typing import Any


def initialize_moments(optimizer: Any) -> None:
    """Give every parameter that has none its moments, which are zero before the first step.

    Adam makes them in its first step. Steps that the guard skips leave it without, and Megatron can neither save nor
    load a state that lacks them. The step counter stays absent, which all of the Adams read as 0.

    Args:
        optimizer: A Megatron optimizer. On a rank without parameters it has no optimizer inside.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)
