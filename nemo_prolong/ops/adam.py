"""AdamW whose step counter lives in the parameter group, as in apex's and Transformer Engine's FusedAdam.

Megatron's distributed optimizer saves ``step`` once per group. With torch's own AdamW, which keeps it per parameter, a
saved run cannot be resumed. The update itself is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdam(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam with one step counter per group.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
        adam_w_mode: Must be true. The recipe uses decoupled decay only.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "the recipe uses decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            step = group["step"] = group.get("step", 0) + 1
            for parameter in parameters:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                # torch adds one to each counter it is given, so every parameter gets its own.
                [torch.tensor(float(step - 1)) for _ in parameters],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
