"""One record per optimizer step: exact sums over all ranks, written by rank 0.

Owns the figures of ``metrics.jsonl`` and the progress line. Loss is the sum of token losses over target tokens of the
global batch, both summed over every rank in float64.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.files import append_line
from nemo_prolong.records.run_log import EVENTS_FILE, METRICS_FILE, Goodput, GrowingRecords, goodput
from nemo_prolong.telemetry.names import named_figures
from nemo_prolong.telemetry.performance import Performance, device_name, peak_memory_bytes
from nemo_prolong.telemetry.step_sums import GroupLoss, StepSums, StepTotals
from nemo_prolong.telemetry.trackers import Trackers
from nemo_prolong.units import format_seconds, format_tokens

log = logging.getLogger(__name__)

Record = dict[str, Any]


class StepMetrics(Callback):
    """Collects, reduces and writes the metrics of every step.

    NeMo hands Lightning's callbacks to Megatron's loop as well, which is why hooks of both kinds are here.

    Args:
        cfg: The stage.
        writer: Knows how long training has waited for checkpoints.
        guard: Knows which steps were skipped; it comes before this among the callbacks.
    """

    def __init__(self, cfg: RunConfig, writer: CheckpointWriter, guard: StepGuard) -> None:
        self.cfg = cfg
        self.path = Path(cfg.run_dir) / METRICS_FILE
        self.consumed_train_tokens = 0
        self.consumed_target_tokens = 0
        self._writer = writer
        self._guard = guard
        self._checkpoint_seconds = 0.0
        self._skipped_steps = 0
        self._step_started = 0.0
        self._recent_seconds: list[float] = []
        # Made when training starts: it needs the process groups. All but the first are rank 0's alone.
        self._sums: StepSums
        self._performance: Performance
        self._trackers: Trackers
        self._goodput: Goodput

    # Counters continue after a resume: Lightning saves the state of its callbacks in every checkpoint.

    def state_dict(self) -> dict[str, int]:
        """Return the token counters."""
        return {"tokens": self.consumed_train_tokens, "target_tokens": self.consumed_target_tokens}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the token counters."""
        self.consumed_train_tokens = state_dict["tokens"]
        self.consumed_target_tokens = state_dict["target_tokens"]

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Start with empty sums; on rank 0, open the trackers and find out when the run began."""
        self._sums = StepSums(self.cfg.seq_length)
        if trainer.is_global_zero:
            self._performance = Performance(self.cfg, device_name(), trainer.world_size)
            self._trackers = Trackers(self.cfg, trainer.global_step)
            self._goodput = _goodput_so_far(self.path.parent)
            self._skipped_steps = self._guard.skipped_steps

    # ---- what every rank adds ---------------------------------------------------------------------------------------

    def on_megatron_microbatch_end(self, step: Any, batch: dict[str, Any], **kwargs: Any) -> None:
        """Count the sizes of a micro-batch, once per data-parallel rank."""
        self._sums.add_data_wait(batch.data_wait_seconds)
        if parallel_state.is_pipeline_last_stage() and _is_first_tensor_and_context_rank():
            self._sums.add_row(batch.real_tokens, batch.squared_tokens)

    def on_megatron_reduce_microbatches_end(self, microbatch_outputs: list[dict[str, Any]], **kwargs: Any) -> None:
        """Add the loss sums of this rank; only the last pipeline stage has any."""
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for output in microbatch_outputs:
                self._sums.add_losses(output["loss_sum_and_ub_size"], output["loss_by_position"], output["domain"])

    # ---- steps and validations --------------------------------------------------------------------------------------

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock of the step."""
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Write the record of the step, and a progress line when it is time."""
        totals = self._sums.reduce(peak_memory_bytes())
        seconds = time.perf_counter() - self._step_started
        self.consumed_train_tokens += totals.real_tokens
        self.consumed_target_tokens += totals.loss.target_tokens
        if not trainer.is_global_zero:
            return
        record = self._record(trainer, totals, seconds)
        self._write(record)
        self._recent_seconds = [*self._recent_seconds[-19:], seconds]
        if record["step"] % self.cfg.train.log_every_n_steps == 0 or record["step"] in (1, self.cfg.train.train_iters):
            self._log_progress(record)

    def _record(self, trainer: pl.Trainer, totals: StepTotals, seconds: float) -> Record:
        now = time.time()
        skipped_before, self._skipped_steps = self._skipped_steps, self._guard.skipped_steps
        useful = seconds if self._skipped_steps == skipped_before else 0.0
        self._goodput = self._goodput._replace(useful_seconds=self._goodput.useful_seconds + useful, ended=now)
        return {
            "step": trainer.global_step,
            "loss": totals.loss.mean,
            "grad_norm": float(trainer.callback_metrics["grad_norm"]),
            "learning_rate": float(trainer.callback_metrics["lr"]),
            "target_tokens": totals.loss.target_tokens,
            "real_tokens": totals.real_tokens,
            "row_tokens": self.cfg.global_batch_tokens,
            "consumed_train_tokens": self.consumed_train_tokens,
            "step_seconds": round(seconds, 4),
            **self._performance.figures(totals, seconds),
            "data_wait_seconds": round(totals.data_wait_seconds, 4),
            "checkpoint_seconds": round(self._newly_waited_for_checkpoints(), 4),
            "memory_bytes": totals.memory_bytes,
            "skipped_steps": self._skipped_steps,
            "goodput": round(self._goodput.fraction, 4),
            "loss_by_position": _groups(totals.by_position),
            "loss_by_domain": _groups(totals.by_domain),
            "time": round(now, 3),
        }

    def _newly_waited_for_checkpoints(self) -> float:
        """Return the seconds that training waited for checkpoints since the last record."""
        before, self._checkpoint_seconds = self._checkpoint_seconds, self._writer.blocked_seconds
        return self._checkpoint_seconds - before

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the exact validation loss: all token losses over all target tokens."""
        totals = self._sums.reduce(peak_memory_bytes())
        if not trainer.is_global_zero or totals.loss.target_tokens == 0:
            return
        record = {
            "step": trainer.global_step,
            "val_loss": totals.loss.mean,
            "val_target_tokens": totals.loss.target_tokens,
            "val_loss_by_position": _groups(totals.by_position),
            "val_loss_by_domain": _groups(totals.by_domain),
            "time": round(time.time(), 3),
        }
        self._write(record)
        tokens = f"{totals.loss.target_tokens:,}"
        log.info("step %d  validation loss %.4f on %s tokens", record["step"], record["val_loss"], tokens)

    # ---- where records go -------------------------------------------------------------------------------------------

    def _write(self, record: Record) -> None:
        try:
            append_line(self.path, json.dumps(record))
        except OSError as error:
            # The ranks would wait for this one. A disk that stays full ends the run through its checkpoints.
            log.error("the record of step %d could not be written: %s", record["step"], error)
        self._trackers.log(named_figures(record), record["step"], record["time"])

    def on_fit_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Close the trackers."""
        if trainer.is_global_zero:
            self._trackers.close(succeeded=True)

    def on_exception(self, trainer: pl.Trainer, *args: Any) -> None:
        """Close the trackers of a run that failed, if it came that far."""
        if hasattr(self, "_trackers"):
            self._trackers.close(succeeded=False)

    def _log_progress(self, record: Record) -> None:
        train_iters = self.cfg.train.train_iters
        left = (train_iters - record["step"]) * statistics.median(self._recent_seconds)
        mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        log.info(
            "step %*d/%d  loss %.4f  grad norm %.3f  lr %.2e  %s tokens/s%s  %s tokens  ETA %s",
            len(str(train_iters)),
            record["step"],
            train_iters,
            record["loss"],
            record["grad_norm"],
            record["learning_rate"],
            f"{record['tokens_per_second']:,.0f}",
            mfu,
            format_tokens(record["consumed_train_tokens"]),
            format_seconds(left),
        )


def _is_first_tensor_and_context_rank() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0


def _groups(losses: dict[str, GroupLoss]) -> dict[str, dict[str, float | int]]:
    return {name: loss._asdict() for name, loss in losses.items()}


def _goodput_so_far(run_dir: Path) -> Goodput:
    """Return the goodput of a run that is about to go on."""
    files = [GrowingRecords(run_dir / name) for name in (METRICS_FILE, EVENTS_FILE)]
    for file in files:
        file.refresh()
    metrics, events = (file.records for file in files)
    now = time.time()
    return goodput(metrics, events) or Goodput(0.0, now, now)
