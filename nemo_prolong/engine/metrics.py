"""One record per optimizer step: exact sums over all ranks, written by rank 0.

Owns the figures of ``metrics.jsonl`` and the progress line. Loss is the sum of token losses over target tokens of the
global batch, both summed over every rank in float64.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from torch.utils.tensorboard import SummaryWriter

from nemo_prolong.units import format_seconds, format_tokens

log = logging.getLogger(__name__)


class StepMetrics(Callback):
    """Collects, reduces and writes the metrics of every step.

    NeMo hands Lightning's callbacks to Megatron's loop as well, which is why hooks of both kinds are here.

    Args:
        path: ``metrics.jsonl`` of the run; lines are appended.
        row_tokens_per_step: ``global_batch_size * seq_length``.
        train_iters: Steps of the stage, for the estimate of the time left.
        log_every_n_steps: Steps between progress lines.
        tensorboard_dir: Directory for TensorBoard events; None writes none.
    """

    def __init__(
        self,
        path: Path,
        row_tokens_per_step: int,
        train_iters: int,
        log_every_n_steps: int,
        tensorboard_dir: Path | None = None,
    ) -> None:
        self.path = path
        self.tensorboard_dir = tensorboard_dir
        self._tensorboard: SummaryWriter | None = None
        self.row_tokens_per_step = row_tokens_per_step
        self.train_iters = train_iters
        self.log_every_n_steps = log_every_n_steps
        self.consumed_train_tokens = 0
        self.consumed_target_tokens = 0
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._step_started = 0.0
        self._recent_seconds: list[float] = []

    # Counters continue after a resume: Lightning saves the state of its callbacks in every checkpoint.

    def state_dict(self) -> dict[str, int]:
        """Return the token counters."""
        return {"tokens": self.consumed_train_tokens, "target_tokens": self.consumed_target_tokens}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the token counters."""
        self.consumed_train_tokens = state_dict["tokens"]
        self.consumed_target_tokens = state_dict["target_tokens"]

    def on_megatron_microbatch_end(self, step: Any, batch: dict[str, Any], **kwargs: Any) -> None:
        """Count the real tokens of a micro-batch, once per data-parallel rank."""
        if parallel_state.is_pipeline_last_stage() and _is_first_tensor_and_context_rank():
            self._sums[2] += batch["real_tokens"]

    def on_megatron_reduce_microbatches_end(self, microbatch_outputs: list[dict[str, Any]], **kwargs: Any) -> None:
        """Add the loss sums of this rank; only the last pipeline stage has any."""
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for output in microbatch_outputs:
                self._sums[:2] += output["loss_sum_and_ub_size"].cpu()

    def _reduce_over_ranks(self) -> tuple[float, int, int]:
        """Return (loss sum, target tokens, real tokens) of all ranks and start counting anew."""
        sums = self._sums.clone()
        self._sums.zero_()
        if torch.cuda.is_available():
            sums = sums.cuda()
        torch.distributed.all_reduce(sums)
        loss_sum, target_tokens, real_tokens = sums.tolist()
        return loss_sum, int(target_tokens), int(real_tokens)

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock of the step."""
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Write the record of the step, and a progress line when it is time."""
        loss_sum, target_tokens, real_tokens = self._reduce_over_ranks()
        seconds = time.perf_counter() - self._step_started
        self.consumed_train_tokens += real_tokens
        self.consumed_target_tokens += target_tokens
        if not trainer.is_global_zero:
            return
        record = {
            "step": trainer.global_step,
            "loss": loss_sum / target_tokens if target_tokens else 0.0,
            "grad_norm": float(trainer.callback_metrics["grad_norm"]),
            "learning_rate": float(trainer.callback_metrics["lr"]),
            "target_tokens": target_tokens,
            "real_tokens": real_tokens,
            "row_tokens": self.row_tokens_per_step,
            "consumed_train_tokens": self.consumed_train_tokens,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(real_tokens / seconds, 1),
            "memory_bytes": _peak_memory_bytes(),
            "time": round(time.time(), 3),
        }
        self._write(record)
        self._recent_seconds = [*self._recent_seconds[-19:], seconds]
        if trainer.global_step % self.log_every_n_steps == 0 or trainer.global_step in (1, self.train_iters):
            self._log_progress(record)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the exact validation loss: all token losses over all target tokens."""
        loss_sum, target_tokens, _ = self._reduce_over_ranks()
        if not trainer.is_global_zero or target_tokens == 0:
            return
        record = {
            "step": trainer.global_step,
            "val_loss": loss_sum / target_tokens,
            "val_target_tokens": target_tokens,
            "time": round(time.time(), 3),
        }
        self._write(record)
        log.info("step %d  validation loss %.4f on %s tokens", record["step"], record["val_loss"], f"{target_tokens:,}")

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.tensorboard_dir is not None:
            self._write_tensorboard(self.tensorboard_dir, record)

    def _write_tensorboard(self, directory: Path, record: dict[str, Any]) -> None:
        """Write the figures of a record as ``train/loss``, ``train/grad_norm``, ..., ``train/val_loss``."""
        if self._tensorboard is None:
            # Events of steps that a resumed run trains again are hidden.
            self._tensorboard = SummaryWriter(str(directory), purge_step=record["step"])
        for key, value in record.items():
            if key not in ("step", "time"):
                self._tensorboard.add_scalar(f"train/{key}", value, record["step"], walltime=record["time"])

    def on_fit_end(self, *args: Any) -> None:
        """Close the TensorBoard events."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _log_progress(self, record: dict[str, Any]) -> None:
        left = (self.train_iters - record["step"]) * statistics.median(self._recent_seconds)
        log.info(
            "step %*d/%d  loss %.4f  grad norm %.3f  lr %.2e  %s tokens/s  %s tokens  ETA %s",
            len(str(self.train_iters)),
            record["step"],
            self.train_iters,
            record["loss"],
            record["grad_norm"],
            record["learning_rate"],
            f"{record['tokens_per_second']:,.0f}",
            format_tokens(record["consumed_train_tokens"]),
            format_seconds(left),
        )


def _is_first_tensor_and_context_rank() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def _peak_memory_bytes() -> int:
    """Return the peak of the device's memory, or of this process on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
