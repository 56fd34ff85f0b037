"""One record per optimizer step, of exact sums over all ranks, written by rank 0.

Owns the figures of ``metrics.jsonl`` and the progress line. Loss is the sum of token losses over target tokens of the
global batch, both summed over every rank in float64.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from nemo_prolong.callbacks.protocol import Callback, TrainingLoop
from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.batch import RankBatch
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import Goodput, StepRecord, ValidationRecord
from nemo_prolong.telemetry.names import named_figures
from nemo_prolong.telemetry.performance import Performance, device_name, peak_memory_bytes
from nemo_prolong.telemetry.step_sums import StepSums, StepTotals
from nemo_prolong.telemetry.trackers import Trackers
from nemo_prolong.units import format_seconds, format_tokens

log = logging.getLogger(__name__)


class StepMetrics(Callback):
    """Collects, reduces and writes the metrics of every step.

    Args:
        cfg: The stage.
        run: Run directory.
        guard: Knows which steps were skipped.
        checkpoint_seconds: Returns how long training has waited for checkpoints so far.
    """

    # The record says whether the step was skipped.
    after = (StepGuard,)

    def __init__(
        self, cfg: RunConfig, run: RunDirectory, guard: StepGuard, checkpoint_seconds: Callable[[], float]
    ) -> None:
        self.cfg = cfg
        self.run = run
        self.consumed_train_tokens = 0
        self.consumed_target_tokens = 0
        self._guard = guard
        self._waited_for_checkpoints = checkpoint_seconds
        self._checkpoint_seconds = 0.0
        self._skipped_steps = 0
        self._step_started = 0.0
        self._recent_seconds: list[float] = []
        # Made when training starts, since they need the process groups. All but the first are rank 0's alone.
        self._sums: StepSums
        self._performance: Performance
        self._trackers: Trackers
        self._goodput: Goodput

    # Counters continue after a resume.

    def state_dict(self) -> dict[str, int]:
        """Return the token counters."""
        return {"tokens": self.consumed_train_tokens, "target_tokens": self.consumed_target_tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the token counters."""
        self.consumed_train_tokens = state["tokens"]
        self.consumed_target_tokens = state["target_tokens"]

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Start with empty sums. On rank 0, open the trackers and find out when the run began."""
        self._sums = StepSums(self.cfg.seq_length)
        if loop.rank == 0:
            self._performance = Performance(self.cfg, device_name(), loop.world_size)
            self._trackers = Trackers(self.cfg, self.run, loop.step)
            now = time.time()
            self._goodput = self.run.goodput() or Goodput(0.0, now, now)
            self._skipped_steps = self._guard.skipped_steps

    # ---- what every rank adds ---------------------------------------------------------------------------------------

    def on_micro_batch_end(self, loop: TrainingLoop, batch: RankBatch) -> None:
        """Count the sizes of a micro-batch, once per data-parallel rank."""
        self._sums.add_data_wait(batch.data_wait_seconds)
        if loop.counts_rows:
            self._sums.add_row(batch.real_tokens, batch.squared_tokens)

    def on_losses(self, loop: TrainingLoop, outputs: Sequence[dict[str, Any]]) -> None:
        """Add the loss sums of this rank. Only the last pipeline stage has any."""
        if loop.counts_losses:
            for output in outputs:
                self._sums.add_losses(output["loss_sum_and_ub_size"], output["loss_by_position"], output["domain"])

    # ---- steps and validations --------------------------------------------------------------------------------------

    def on_step_start(self, loop: TrainingLoop) -> None:
        """Start the clock of the step."""
        self._step_started = time.perf_counter()

    def on_step_end(self, loop: TrainingLoop) -> None:
        """Write the record of the step, and a progress line when it is time."""
        totals = self._sums.reduce(peak_memory_bytes())
        seconds = time.perf_counter() - self._step_started
        self.consumed_train_tokens += totals.real_tokens
        self.consumed_target_tokens += totals.loss.target_tokens
        if loop.rank != 0:
            return
        record = self._record(loop, totals, seconds)
        self._write(record)
        self._recent_seconds = [*self._recent_seconds[-19:], seconds]
        if record.step % self.cfg.train.log_every_n_steps == 0 or record.step in (1, self.cfg.train.train_iters):
            self._log_progress(record)

    def _record(self, loop: TrainingLoop, totals: StepTotals, seconds: float) -> StepRecord:
        now = time.time()
        skipped_before, self._skipped_steps = self._skipped_steps, self._guard.skipped_steps
        useful = seconds if self._skipped_steps == skipped_before else 0.0
        self._goodput = self._goodput._replace(useful_seconds=self._goodput.useful_seconds + useful, ended=now)
        return StepRecord(
            step=loop.step,
            loss=totals.loss.mean,
            grad_norm=loop.grad_norm,
            learning_rate=loop.learning_rate,
            target_tokens=totals.loss.target_tokens,
            real_tokens=totals.real_tokens,
            row_tokens=self.cfg.global_batch_tokens,
            consumed_train_tokens=self.consumed_train_tokens,
            step_seconds=round(seconds, 4),
            **self._performance.figures(totals, seconds),
            data_wait_seconds=round(totals.data_wait_seconds, 4),
            checkpoint_seconds=round(self._newly_waited_for_checkpoints(), 4),
            memory_bytes=totals.memory_bytes,
            skipped_steps=self._skipped_steps,
            goodput=round(self._goodput.fraction, 4),
            loss_by_position=totals.by_position,
            loss_by_domain=totals.by_domain,
            time=round(now, 3),
        )

    def _newly_waited_for_checkpoints(self) -> float:
        """Return the seconds that training waited for checkpoints since the last record."""
        before, self._checkpoint_seconds = self._checkpoint_seconds, self._waited_for_checkpoints()
        return self._checkpoint_seconds - before

    def on_validation_end(self, loop: TrainingLoop) -> None:
        """Write the exact validation loss, which is all token losses over all target tokens."""
        totals = self._sums.reduce(peak_memory_bytes())
        if loop.rank != 0:
            return
        record = ValidationRecord(
            step=loop.step,
            val_loss=totals.loss.mean,
            val_target_tokens=totals.loss.target_tokens,
            val_loss_by_position=totals.by_position,
            val_loss_by_domain=totals.by_domain,
            time=round(time.time(), 3),
        )
        self._write(record)
        tokens = f"{record.val_target_tokens:,}"
        log.info("step %d  validation loss %.4f on %s tokens", record.step, record.val_loss, tokens)

    # ---- where records go -------------------------------------------------------------------------------------------

    def _write(self, record: StepRecord | ValidationRecord) -> None:
        try:
            self.run.append_metrics(record)
        except OSError as error:
            # The ranks would wait for this one. A disk that stays full ends the run through its checkpoints.
            log.error("the record of step %d could not be written: %s", record.step, error)
        assert record.time is not None, "only records of earlier versions have none"
        self._trackers.log(named_figures(record.as_json()), record.step, record.time)

    def on_end(self, loop: TrainingLoop) -> None:
        """Close the trackers."""
        if loop.rank == 0:
            self._trackers.close(succeeded=True)

    def on_exception(self, loop: TrainingLoop) -> None:
        """Close the trackers of a run that failed, if it came that far."""
        if hasattr(self, "_trackers"):
            self._trackers.close(succeeded=False)

    def _log_progress(self, record: StepRecord) -> None:
        train_iters = self.cfg.train.train_iters
        left = (train_iters - record.step) * statistics.median(self._recent_seconds)
        mfu = f"  MFU {record.mfu:.1%}" if record.mfu is not None else ""
        log.info(
            "step %*d/%d  loss %s  grad norm %.3f  lr %.2e  %s tokens/s%s  targets %s  %s tokens  ETA %s",
            len(str(train_iters)),
            record.step,
            train_iters,
            f"{record.loss:.4f}" if record.target_tokens else "none",
            record.grad_norm,
            record.learning_rate,
            f"{record.tokens_per_second:,.0f}",
            mfu,
            f"{(record.target_tokens or 0) / self.cfg.global_batch_tokens:.1%}",
            format_tokens(record.consumed_train_tokens),
            format_seconds(left),
        )
