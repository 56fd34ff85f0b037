"""Skips steps that would harm the model, and those that nothing can be learned from.

The first have gradients that are no numbers, or a loss or norm far above the last ones. The others have rows without a
single target token. Their gradient is zero, and Adam would still move the weights by its moments and by weight decay.

All ranks judge the same figures, the loss and targets of the global batch and the norm of its gradient, so all skip the
same step. A skipped step takes its rows and its place in the schedule with it. Weights and optimizer state stay.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_prolong.callbacks.protocol import Callback, TrainingLoop
from nemo_prolong.config.schema import FaultsConfig
from nemo_prolong.errors import DataError, TrainingError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.text import counted

log = logging.getLogger(__name__)

Figures = tuple[float, float]

_SMALLEST_DEVIATION = 0.01
"""Of the mean. A series without noise has no standard deviation to compare with."""
_FREQUENT_SKIPS, _WINDOW_STEPS = 4, 100
"""So many skipped steps within so many are said loudly, and again at every doubling. One is chance."""
_NAMED_ROWS = 4
"""Rows of a step that a message names; a global batch may have hundreds."""


class SpikeDetector:
    """Judges a loss and a gradient norm by those of the last steps that were taken.

    Args:
        sigmas: Standard deviations above the mean from which a figure is a spike. None judges by NaN and Inf alone.
        window_steps: Steps that mean and deviation are taken of. Nothing is a spike before there are as many.
    """

    def __init__(self, sigmas: float | None, window_steps: int) -> None:
        self.sigmas = sigmas
        self.taken: deque[Figures] = deque(maxlen=window_steps)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """Return what is wrong with a step, or None. A good step becomes part of the window."""
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
    """Says no to the optimizer step where the detector finds a fault, or there is nothing to learn.

    Args:
        faults: The settings.
        run: Run directory.
        rows_of_step: Returns the names of the rows of a step of the stage, counted from 1.

    Attributes:
        skipped_steps: Steps that were left out so far.
    """

    def __init__(self, faults: FaultsConfig, run: RunDirectory, rows_of_step: Callable[[int], Sequence[str]]) -> None:
        self.faults = faults
        self.run = run
        self._rows_of_step = rows_of_step
        self.detector = SpikeDetector(faults.spike_sigmas, faults.spike_window_steps)
        self.skipped_steps = 0
        self._in_a_row = 0
        self._without_targets = 0
        self._skipped_at: deque[int] = deque()
        self._sums = torch.zeros(2, dtype=torch.float64)

    # A resumed run judges by the same window and goes on counting.

    def state_dict(self) -> dict[str, Any]:
        """Return counters and window."""
        return {
            "skipped_steps": self.skipped_steps,
            "in_a_row": self._in_a_row,
            "without_targets": self._without_targets,
            "skipped_at": list(self._skipped_at),
            "taken": [list(figures) for figures in self.detector.taken],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore counters and window."""
        self.skipped_steps, self._in_a_row = state["skipped_steps"], state["in_a_row"]
        # Checkpoints of earlier versions have neither.
        self._without_targets = state.get("without_targets", 0)
        self._skipped_at = deque(state.get("skipped_at", []))
        self.detector.taken.clear()
        self.detector.taken.extend((loss, grad_norm) for loss, grad_norm in state["taken"])

    def on_step_start(self, loop: TrainingLoop) -> None:
        """Forget the losses of a validation."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    def on_losses(self, loop: TrainingLoop, outputs: Sequence[dict[str, Any]]) -> None:
        """Add the loss sums of this rank. Only the last pipeline stage has any."""
        for output in outputs:
            self._sums = self._sums.to(output["loss_sum_and_ub_size"].device) + output["loss_sum_and_ub_size"]

    def allows_step(self, loop: TrainingLoop, grad_norm: float) -> bool:
        """Return whether the step is without fault and has something to learn from.

        Raises:
            TrainingError: On every rank, after too many skipped steps in a row.
            DataError: On every rank, after too many steps in a row whose rows have no target token.
        """
        loss_sum, targets = self._global_sums()
        # A sum that is no number is a fault, which the detector names.
        if not targets and math.isfinite(loss_sum) and math.isfinite(grad_norm):
            self._skip_without_targets(loop)
            return False
        self._without_targets = 0
        fault = self.detector.fault(loss_sum / targets if targets else loss_sum, grad_norm)
        if fault is None:
            self._in_a_row = 0
            return True
        self._skip(loop, fault)
        return False

    def _global_sums(self) -> tuple[float, float]:
        """Return loss sum and target tokens of the global batch, up to a common factor.

        Every tensor-parallel rank adds the same sums, as often to the losses as to the targets.
        """
        sums = self._sums.to("cuda") if torch.cuda.is_available() else self._sums
        torch.distributed.all_reduce(sums)
        loss_sum, targets = sums.tolist()
        return loss_sum, targets

    def _skip_without_targets(self, loop: TrainingLoop) -> None:
        self.skipped_steps += 1
        self._without_targets += 1
        step, rows = loop.step + 1, self._named_rows(loop.step + 1)
        if loop.rank == 0:
            log.warning("step %d is skipped on all ranks: no token of its rows is a target (%s)", step, rows)
            self.run.record_event(step, "no_targets", rows)
        # A shorter stage would otherwise end as if it had learned something.
        if self._without_targets >= min(self.faults.max_steps_without_targets, loop.train_iters):
            raise DataError(
                f"step {step}",
                f"{counted(self._without_targets, 'step')} in a row had no target token, so there was nothing to "
                f"learn; the rows of the last one: {rows}.",
                "Look at these rows with scripts/inspect_data.py and prepare the data again with longer rows, or raise "
                "faults.max_steps_without_targets.",
            )

    def _named_rows(self, step: int) -> str:
        rows = self._rows_of_step(step)
        more = len(rows) - _NAMED_ROWS
        return ", ".join(rows[:_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")

    def _skip(self, loop: TrainingLoop, fault: str) -> None:
        self.skipped_steps += 1
        self._in_a_row += 1
        step = loop.step + 1
        if loop.rank == 0:
            log.warning("step %d is skipped on all ranks: %s", step, fault)
            self.run.record_event(step, "step_skipped", fault)
        self._warn_of_frequent_skips(loop, step, fault)
        if self._in_a_row >= self.faults.max_skipped_in_a_row:
            raise TrainingError(
                f"step {step}",
                f"{self._in_a_row} steps in a row would have harmed the model; the last one: {fault}.",
                "Continue from the last checkpoint with a lower optim.lr under another name, look at the rows of these "
                "steps, or raise faults.max_skipped_in_a_row.",
            )

    def _warn_of_frequent_skips(self, loop: TrainingLoop, step: int, fault: str) -> None:
        """Say that steps are skipped often: kernels that return NaN now and then look like bad rows, and are not."""
        self._skipped_at.append(step)
        while self._skipped_at[0] <= step - _WINDOW_STEPS:
            self._skipped_at.popleft()
        count = len(self._skipped_at)
        if loop.rank == 0 and count >= _FREQUENT_SKIPS and count & (count - 1) == 0:
            text = (
                f"{count} of the last {min(step, _WINDOW_STEPS)} steps were skipped, {self.skipped_steps} of the "
                f"stage; the last one: {fault}. Look at the rows of these steps. If they are sound, suspect the "
                "kernels of attention: cuDNN before 9.18 is known for NaN"
            )
            log.error("%s", text)
            self.run.record_event(step, "skips_frequent", text)
