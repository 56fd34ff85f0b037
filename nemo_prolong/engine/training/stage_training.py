"""Train a stage with NeMo: the one function the stages room calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from torch.distributed import Store

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.callbacks.step_metrics import StepMetrics
from nemo_prolong.callbacks.stop_signal import StopOnSignal
from nemo_prolong.callbacks.watchdog import HangWatchdog
from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.schema import RunConfig, Transition
from nemo_prolong.data.loading import explained_worker_deaths
from nemo_prolong.distributed.devices import check_devices
from nemo_prolong.distributed.ending import ending_together
from nemo_prolong.distributed.rank_environment import RankEnvironment, rank_and_size
from nemo_prolong.distributed.rendezvous import decided_by_rank_zero, known_by_all, open_store, refuse_together
from nemo_prolong.engine.checkpoint.hf_restore import HuggingFaceRestore
from nemo_prolong.engine.model.nemo_model import build_model
from nemo_prolong.engine.training.data_module import PackedDataModule
from nemo_prolong.engine.training.lightning_loop import lightning_callbacks
from nemo_prolong.engine.training.recompute import with_recompute
from nemo_prolong.engine.training.trainer import build_trainer
from nemo_prolong.errors import ProlongError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.weights.pickles import check_pickles


@dataclass(frozen=True)
class StageTotals:
    """What a stage has done.

    Attributes:
        step: Optimizer steps.
        consumed_train_tokens: Tokens without padding.
        consumed_target_tokens: Tokens with a loss.
        skipped_steps: Steps that were left out because they would have harmed the model.
        stopped: Whether a signal ended training before its last step; the state is saved.
    """

    step: int
    consumed_train_tokens: int
    consumed_target_tokens: int
    skipped_steps: int
    stopped: bool


class StageCallbacks(NamedTuple):
    """What happens around the steps of a stage."""

    guard: StepGuard
    metrics: StepMetrics
    writer: CheckpointWriter
    stop: StopOnSignal
    watchdog: HangWatchdog

    @classmethod
    def of(cls, cfg: RunConfig, run: RunDirectory, data: PackedDataModule) -> StageCallbacks:
        """Return the callbacks of a stage that writes to a run directory and trains on the rows of ``data``."""
        guard, writer = StepGuard(cfg.faults, run, data.rows_of_step), CheckpointWriter(cfg, run)
        metrics = StepMetrics(cfg, run, guard, writer.waited_seconds)
        return cls(guard, metrics, writer, StopOnSignal(writer, run), HangWatchdog(cfg.faults.hang_seconds, run))

    def totals(self, step: int) -> StageTotals:
        """Return what the stage has done after ``step`` optimizer steps."""
        return StageTotals(
            step=step,
            consumed_train_tokens=self.metrics.consumed_train_tokens,
            consumed_target_tokens=self.metrics.consumed_target_tokens,
            skipped_steps=self.guard.skipped_steps,
            stopped=self.stop.stopped,
        )


def train_stage(
    cfg: RunConfig, run: RunDirectory, resume: Path | None, parent_checkpoint: Path | None, complete: bool = False
) -> StageTotals | None:
    """Train until ``train_iters`` and return the totals of the stage, or None where there is nothing to do.

    Args:
        cfg: The stage.
        run: Its run directory.
        resume: Verified checkpoint of this run to continue from. Here and below rank 0's choice counts, on every rank.
        parent_checkpoint: Verified checkpoint to take weights (and optimizer state) from when not resuming.
        complete: Whether the run is complete already. All ranks end then.

    Raises:
        ConfigError: If the stage needs kernels that do not exist for this device and these versions, or a rank does not
            see a GPU for each rank of its machine.
        DataError: If a row cannot be read or does not fit. This and the others on every rank, if on any.
        CheckpointError: If the checkpoint holds something that loading would execute, or saving fails too often.
        DataError: If rows do not fit the stage, or too many steps in a row have no target token.
        TrainingError: If too many steps in a row would have harmed the model.
        KeyboardInterrupt: For Ctrl-C.
    """
    store = open_store()
    with ending_together(store, *rank_and_size()):
        if known_by_all(store, "complete", complete):
            return None
        return _train(cfg, run, resume, parent_checkpoint, store)


def _train(
    cfg: RunConfig, run: RunDirectory, resume: Path | None, parent_checkpoint: Path | None, store: Store
) -> StageTotals:
    check_devices(RankEnvironment.current())
    resume = _rank_zero_path(store, "resume", resume)
    parent_checkpoint = _rank_zero_path(store, "parent_checkpoint", parent_checkpoint)
    opened = resume or parent_checkpoint
    if opened is not None:
        refuse_together(store, lambda: check_pickles(opened), *rank_and_size())
    torch.manual_seed(cfg.seed)
    _set_arithmetic(cfg.train.deterministic)
    data = PackedDataModule(cfg)
    callbacks = StageCallbacks.of(cfg, run, data)
    restore: RestoreConfig | None = None
    if resume is None and cfg.parent is not None and cfg.parent.startswith(HF_PREFIX):
        restore = HuggingFaceRestore(path=cfg.parent.removeprefix(HF_PREFIX), model=cfg.model)
    elif resume is None and parent_checkpoint is not None:
        restore = RestoreConfig(
            path=str(parent_checkpoint),
            load_model_state=True,
            load_optim_state=cfg.transition == Transition.WEIGHTS_AND_OPTIMIZER,
        )
    hooks = lightning_callbacks(callbacks, cfg, run)
    trainer = build_trainer(cfg, hooks, validate=data.validates, store=store, restore=restore)
    callbacks.stop.listen()
    try:
        with _first_error(), explained_worker_deaths():
            model = build_model(with_recompute(cfg, store), restored=opened is not None or restore is not None)
            trainer.fit(model, datamodule=data, ckpt_path=str(resume) if resume else None)
    finally:
        callbacks.stop.restore()
    totals = callbacks.totals(trainer.global_step)
    _leave_process_groups()
    return totals


@contextmanager
def _first_error() -> Iterator[None]:
    """Raise what went wrong first: Ctrl-C, which Lightning turns into an exit with 1, or an error of ours.

    Where Lightning takes apart what it has not put together yet, that fails too.
    """
    try:
        yield
    except BaseException as error:
        first: BaseException | None = error
        while first is not None and not isinstance(first, KeyboardInterrupt | ProlongError):
            first = first.__context__
        if first is None or first is error:
            raise
        raise first from None


def _set_arithmetic(deterministic: bool) -> None:
    # Images of NVIDIA let torch multiply fp32 matrices in TF32; fp32 here is fp32.
    torch.set_float32_matmul_precision("highest")
    if deterministic:
        # cuBLAS reads it when its first handle is made; with its own workspaces it may sum in another order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # torch would also fill every new tensor first, in case it is read before it is written: a pass over memory each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _rank_zero_path(store: Store, key: str, path: Path | None) -> Path | None:
    decided = decided_by_rank_zero(store, key, str(path) if path else None)
    return Path(decided) if decided else None


def _leave_process_groups() -> None:
    """Leave the process as it was found, so that a second stage can run in it."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
