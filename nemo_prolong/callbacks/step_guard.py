"""Skips the steps that would harm the model: gradients that are no numbers, losses and norms far above the last ones.

All ranks judge the same two figures, the loss of the global batch and the norm of its gradient, so all skip the same
step. A skipped step takes its rows and its place in the schedule with it; weights and optimizer state stay.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from nemo_prolong.config.schema import FaultsConfig
from nemo_prolong.errors import TrainingError
from nemo_prolong.records.run_log import record_event

log = logging.getLogger(__name__)

Figures = tuple[float, float]
StepResult = tuple[bool, float | None, int | None]

_SMALLEST_DEVIATION = 0.01
"""Of the mean: a series without noise has no standard deviation to compare with."""


class SpikeDetector:
    """Judges a loss and a gradient norm by those of the last steps that were taken.

    Args:
        sigmas: Standard deviations above the mean from which a figure is a spike; None judges by NaN and Inf alone.
        window_steps: Steps that mean and deviation are taken of. Nothing is a spike before there are as many.
    """

    def __init__(self, sigmas: float | None, window_steps: int) -> None:
        self.sigmas = sigmas
        self.taken: deque[Figures] = deque(maxlen=window_steps)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, or None; a good step becomes part of the window."""
        fault = self._fault(loss, grad_norm)
        if fault is None:
            self.taken.append((loss, grad_norm))
        return fault

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        named = {"loss": loss, "grad norm": grad_norm}
        for name, value in named.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self.sigmas is None or len(self.taken) < (self.taken.maxlen or 0):
            return None
        for (name, value), series in zip(named.items(), zip(*self.taken, strict=True), strict=True):
            mean = statistics.fmean(series)
            limit = mean + self.sigmas * max(statistics.pstdev(series, mean), _SMALLEST_DEVIATION * abs(mean))
            if value > limit:
                return (
                    f"{name} is {value:.4g}, above {limit:.4g}: {self.sigmas:g} standard deviations over the mean of "
                    f"the last {len(series)} steps"
                )
        return None


class StepGuard(Callback):
    """Stands before Megatron's optimizer step and leaves it out where the detector finds a fault.

    Args:
        faults: The settings.
        run_dir: Where ``events.jsonl`` lies.
    """

    def __init__(self, faults: FaultsConfig, run_dir: Path) -> None:
        self.faults = faults
        self.run_dir = run_dir
        self.detector = SpikeDetector(faults.spike_sigmas, faults.spike_window_steps)
        self.skipped_steps = 0
        self._in_a_row = 0
        self._step = 0
        self._sums = torch.zeros(2, dtype=torch.float64)

    # A resumed run judges by the same window and goes on counting.

    def state_dict(self) -> dict[str, Any]:
        """Return counters and window."""
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self._in_a_row,
            "taken": [list(figures) for figures in self.detector.taken],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore counters and window."""
        self.skipped_steps, self._in_a_row = state_dict["skipped_steps"], state_dict["in_a_row"]
        self.detector.taken.clear()
        self.detector.taken.extend((loss, grad_norm) for loss, grad_norm in state_dict["taken"])

    def on_fit_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stand before the step of every optimizer; they exist by now."""
        for optimizer in trainer.optimizers:
            megatron = optimizer.mcore_optimizer
            megatron.step = functools.partial(self._step_unless_harmful, megatron, megatron.step)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Forget the losses of a validation."""
        self._step = trainer.global_step + 1
        self._sums = torch.zeros(2, dtype=torch.float64)

    def on_megatron_reduce_microbatches_end(self, microbatch_outputs: list[dict[str, Any]], **kwargs: Any) -> None:
        """Add the loss sums of this rank; only the last pipeline stage has any."""
        for output in microbatch_outputs:
            self._sums = self._sums.to(output["loss_sum_and_ub_size"].device) + output["loss_sum_and_ub_size"]

    def _step_unless_harmful(self, optimizer: Any, step: Callable[[], StepResult]) -> StepResult:
        """Do what ``step`` does and return it, or leave it out.

        Raises:
            TrainingError: On every rank, after too many skipped steps in a row.
        """
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        fault = self.detector.fault(self._global_loss(), grad_norm)
        if fault is None:
            self._in_a_row = 0
            return step()
        self._skip(fault)
        return False, grad_norm, None

    def _global_loss(self) -> float:
        """Return the mean over the target tokens of the global batch.

        Every tensor-parallel rank adds the same sums: as often to the losses as to the targets.
        """
        sums = self._sums.to("cuda") if torch.cuda.is_available() else self._sums
        torch.distributed.all_reduce(sums)
        loss_sum, targets = sums.tolist()
        return loss_sum / targets if targets else 0.0

    def _skip(self, fault: str) -> None:
        self.skipped_steps += 1
        self._in_a_row += 1
        if torch.distributed.get_rank() == 0:
            log.warning("step %d is skipped on all ranks: %s", self._step, fault)
            record_event(self.run_dir, self._step, "step_skipped", fault)
        if self._in_a_row >= self.faults.max_skipped_in_a_row:
            raise TrainingError(
                f"step {self._step}",
                f"{self._in_a_row} steps in a row would have harmed the model; the last one: {fault}.",
                "Continue from the last checkpoint with a lower optim.lr under another name, look at the rows of these "
                "steps, or raise faults.max_skipped_in_a_row.",
            )
