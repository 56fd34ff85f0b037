"""The learning-rate schedule of the recipe: linear warmup, cosine decay to a floor."""

from __future__ import annotations

import math
from typing import Any

from nemo.lightning.pytorch.optim import LRSchedulerModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_factor(step: int, train_iters: int, warmup_iters: int, min_lr_ratio: float) -> float:
    """Return the factor on the peak learning rate for one optimizer step.

    The source is ProLong's trainer (``trainer.min_lr_bound``), on Hugging Face's cosine schedule. Warmup starts at
    zero, so the first step of a stage changes nothing, as in the original. The floor bends the cosine and does not cut
    it.

    Args:
        step: Optimizer steps done so far, from 0.
        train_iters: Steps of the stage.
        warmup_iters: Steps of linear warmup.
        min_lr_ratio: Learning rate at the end, as a share of the peak.
    """
    if step < warmup_iters:
        return step / warmup_iters
    progress = (step - warmup_iters) / max(1, train_iters - warmup_iters)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return min_lr_ratio + (1.0 - min_lr_ratio) * cosine


class WarmupCosine(LRSchedulerModule):
    """The schedule in the form NeMo's optimizer module wants.

    Args:
        train_iters: Steps of the stage.
        warmup_iters: Steps of linear warmup.
        min_lr_ratio: Learning rate at the end, as a share of the peak.
    """

    def __init__(self, train_iters: int, warmup_iters: int, min_lr_ratio: float) -> None:
        super().__init__()
        self.train_iters = train_iters
        self.warmup_iters = warmup_iters
        self.min_lr_ratio = min_lr_ratio

    def _factor(self, step: int) -> float:
        return learning_rate_factor(step, self.train_iters, self.warmup_iters, self.min_lr_ratio)

    def scheduler(self, model: Any, optimizers: Optimizer | list[Optimizer]) -> dict[str, Any]:
        """Return the scheduler, stepped once per optimizer step."""
        optimizer = optimizers[0] if isinstance(optimizers, list) else optimizers
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": _StageLR(optimizer, self._factor), "interval": "step", "frequency": 1},
        }


class _StageLR(LambdaLR):
    """A schedule whose peak is that of the configuration: a checkpoint brings along the number of steps only."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the steps of the checkpoint; comes after the optimizer has loaded its state."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, rate in zip(self.optimizer.param_groups, self._closed_form_rates(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _closed_form_rates(self) -> list[float]:
        return [
            float(base) * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
