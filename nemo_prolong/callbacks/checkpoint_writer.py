"""When a stage is saved, what happens when that fails, and which checkpoints are kept."""

from __future__ import annotations

import logging
import time

import torch

from nemo_prolong.callbacks.protocol import Callback, CheckpointSave, TrainingLoop
from nemo_prolong.callbacks.step_metrics import StepMetrics
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.ranks import RankFailure, from_rank_zero
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import listed_steps
from nemo_prolong.records.checkpoint.retention import delete_checkpoint, remove_leftovers, superseded
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)


class CheckpointWriter(Callback):
    """Saves every ``save_interval_steps``, every ``save_interval_minutes`` and after the last step.

    A save that fails is reported, its files are removed, and training goes on from the state it has. The checkpoints
    before it are untouched. After ``max_failed_saves`` in a row, or when the last one fails, training stops.

    Args:
        cfg: The stage.
        run: Run directory.
    """

    # A step is recorded, then saved. So a run resumed from the checkpoint has the record of its last step.
    after = (StepMetrics,)

    def __init__(self, cfg: RunConfig, run: RunDirectory) -> None:
        self.cfg = cfg
        self.run = run
        self._waited_seconds = 0.0
        on_gpu = torch.cuda.is_available()
        self.background = on_gpu if cfg.checkpoint.async_save is None else cfg.checkpoint.async_save
        self._pending: CheckpointSave | None = None
        self._failed_saves = 0
        # Steps of the last save, whatever became of it, and of the last one that is complete.
        self._saved_step = 0
        self._complete_step = 0
        self._is_final = False
        self._refused: set[int] = set()
        self._last_save_seconds = time.monotonic()
        self._blocked_seconds = 0.0

    def waited_seconds(self) -> float:
        """Return how long training has waited for saves between steps, in this process."""
        return self._waited_seconds

    def reached(self, point: str) -> None:
        """Do nothing. The tests kill the process here, at each point of the save path."""

    def on_train_start(self, loop: TrainingLoop) -> None:
        """Delete what killed saves left. The run has chosen its checkpoint by now."""
        if loop.rank == 0:
            for name in remove_leftovers(self.run.path):
                log.info("removed %s, left by a process that was killed", name)
            # Newer ones than the one it resumes from were refused.
            self._refused = {step for step in listed_steps(self.run.path) if step > loop.step}
        self._last_save_seconds = time.monotonic()

    def on_step_end(self, loop: TrainingLoop) -> None:
        """Complete a save that has been written meanwhile. Save when it is time."""
        started = time.monotonic()
        if self._pending is not None and self._pending.is_written():
            self.wait()
        if self._is_due(loop.step):
            self.save(loop)
        self._waited_seconds += time.monotonic() - started

    def on_train_end(self, loop: TrainingLoop) -> None:
        """Complete the last save."""
        self.wait()

    def _is_due(self, step: int) -> bool:
        if step == self._saved_step:
            return False
        if step % self.cfg.checkpoint.save_interval_steps == 0 or step == self.cfg.train.train_iters:
            return True
        minutes = self.cfg.checkpoint.save_interval_minutes
        # Clocks of hosts differ, so rank 0's decides.
        return minutes is not None and from_rank_zero(time.monotonic() - self._last_save_seconds >= 60 * minutes)

    def save(self, loop: TrainingLoop) -> None:
        """Save now, on all ranks. ``wait`` returns when the checkpoint is complete.

        Raises:
            CheckpointError: On every rank, if this was one failure too many.
        """
        self.wait()
        started = time.monotonic()
        save = loop.new_save(self.reached)
        self._pending, self._saved_step, self._last_save_seconds = save, save.step, started
        try:
            save.start(background=self.background)
        except RankFailure as failure:
            self._give_up(save, failure)
            return
        self._blocked_seconds = time.monotonic() - started
        if not self.background:
            self.wait()

    def save_before_stop(self, loop: TrainingLoop) -> None:
        """Have the state of this step saved and complete, on all ranks. One that failed is saved again.

        Raises:
            CheckpointError: On every rank, if it could not be saved. No later save would make up for it.
        """
        self.wait()
        self._is_final = True
        if loop.step != self._complete_step:
            self.save(loop)
            self.wait()

    def wait(self) -> None:
        """Complete the save that is under way, if there is one.

        Raises:
            CheckpointError: On every rank, if it failed and that was one failure too many.
        """
        if self._pending is None:
            return
        save, started = self._pending, time.monotonic()
        try:
            save.complete()
        except RankFailure as failure:
            self._give_up(save, failure)
            return
        self._pending, self._failed_saves, self._complete_step = None, 0, save.step
        self._blocked_seconds += time.monotonic() - started
        if save.manifest is not None:
            self._report(save, format_bytes(save.manifest.total_bytes))
            self._delete_superseded(save)
        torch.distributed.barrier()

    def _report(self, save: CheckpointSave, size: str) -> None:
        seconds = time.monotonic() - self._last_save_seconds
        detail = f"{size} in {seconds:.1f} s, training waited {self._blocked_seconds:.1f} s"
        log.info("saved %s, %s", save.final, detail)
        self.run.record_event(save.step, "checkpoint_saved", f"{save.final.name}: {detail}")

    def _give_up(self, save: CheckpointSave, failure: RankFailure) -> None:
        """Clean up after a failed save. Stop when it was one too many."""
        self._pending = None
        self._failed_saves += 1
        if torch.distributed.get_rank() == 0:
            save.abandon()
            log.error("checkpoint of step %d failed, the ones before it are untouched: %s", save.step, failure)
            self.run.record_event(save.step, "checkpoint_failed", str(failure))
        is_last = self._is_final or save.step == self.cfg.train.train_iters
        if is_last or self._failed_saves >= self.cfg.checkpoint.max_failed_saves:
            raise CheckpointError(
                str(save.final),
                f"it could not be saved, {self._failed_saves} in a row: {failure}.",
                "Make room or repair the file system, then repeat the command: it continues from the newest good one.",
            ) from failure

    def _delete_superseded(self, save: CheckpointSave) -> None:
        """Delete what is too old, on rank 0, which has seen the new checkpoint complete."""
        settings = self.cfg.checkpoint
        self._refused.discard(save.step)
        try:
            for old in superseded(
                self.run.path, save.final, settings.keep_last, settings.keep_every_steps, self._refused
            ):
                delete_checkpoint(old)
        except (OSError, CheckpointError) as error:
            log.warning("an old checkpoint could not be deleted: %s", error)
        self.reached("old_deleted")
