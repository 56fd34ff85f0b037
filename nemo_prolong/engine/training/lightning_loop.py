"""Our callbacks in Lightning's loop: the one place that knows both.

Lightning calls some hooks. Megatron's part of NeMo calls the others, and NeMo hands Lightning's callbacks on to it.
Each of our callbacks gets an adapter of its own, under its own name. So its state lies in a checkpoint where it always
did. Another loop would replace this module, and no callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from nemo_prolong.callbacks.protocol import Callback, CheckpointSave, in_order
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine.checkpoint.save import MegatronCheckpointSave
from nemo_prolong.engine.patches.optimizer_step import gate_step
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.run_directory import RunDirectory


def lightning_callbacks(callbacks: Sequence[Callback], cfg: RunConfig, run: RunDirectory) -> list[pl.Callback]:
    """Return callbacks as Lightning takes them, in the order that they declare.

    Args:
        callbacks: Ours.
        cfg: The stage.
        run: Its run directory.
    """
    ordered = in_order(callbacks)
    return [_OptimizerGate(ordered, cfg, run), *(_Adapter(callback, cfg, run) for callback in ordered)]


class LightningLoop:
    """What our callbacks see of Lightning's trainer, see ``TrainingLoop``.

    Args:
        trainer: The trainer, while it fits.
        cfg: The stage.
        run: Its run directory.
    """

    def __init__(self, trainer: pl.Trainer, cfg: RunConfig, run: RunDirectory) -> None:
        self._trainer = trainer
        self._cfg = cfg
        self._run = run

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._trainer.global_step

    @property
    def train_iters(self) -> int:
        """Steps of the stage."""
        return self._cfg.train.train_iters

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._trainer.global_rank

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self._trainer.world_size

    @property
    def counts_rows(self) -> bool:
        """Whether this rank is on the last pipeline stage, and the first of the ranks that share a row there."""
        first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
        return first and parallel_state.is_pipeline_last_stage()

    @property
    def counts_losses(self) -> bool:
        """Whether this is the first of the tensor-parallel ranks, which have the same losses."""
        return parallel_state.get_tensor_model_parallel_rank() == 0

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of the step that ended, before clipping."""
        return float(self._trainer.callback_metrics["grad_norm"])

    @property
    def learning_rate(self) -> float:
        """Learning rate of the step that ended."""
        return float(self._trainer.callback_metrics["lr"])

    def new_save(self, reached: Callable[[str], None]) -> CheckpointSave:
        """Return a save of the trainer's state."""
        description = ModelDescription.of_run(self._cfg, self.step)
        return MegatronCheckpointSave(self._trainer, self._run, description, reached)

    def stop(self) -> None:
        """End training after this step."""
        self._trainer.should_stop = True


class _Hooks(pl.Callback):
    """What both kinds of adapters have: the stage, and the loop once there is a trainer."""

    def __init__(self, cfg: RunConfig, run: RunDirectory) -> None:
        self._cfg = cfg
        self._run = run
        self._loop: LightningLoop

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Meet the trainer."""
        self._loop = LightningLoop(trainer, self._cfg, self._run)


class _OptimizerGate(_Hooks):
    """Asks all callbacks before the optimizer steps.

    Args:
        callbacks: In their order; the first that says no is the last that is asked.
        cfg: The stage.
        run: Its run directory.
    """

    def __init__(self, callbacks: Sequence[Callback], cfg: RunConfig, run: RunDirectory) -> None:
        super().__init__(cfg, run)
        self._callbacks = callbacks

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand before the step of every optimizer; they exist by now."""
        super().on_fit_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            gate_step(optimizer.mcore_optimizer, self._allows)

    def _allows(self, grad_norm: float) -> bool:
        return all(callback.allows_step(self._loop, grad_norm) for callback in self._callbacks)


class _Adapter(_Hooks):
    """One of our callbacks as one of Lightning's and Megatron's.

    Args:
        callback: Ours.
        cfg: The stage.
        run: Its run directory.

    Attributes:
        state_key: The name of its state in a checkpoint.
    """

    # A property of Lightning's, which names every state after the class of the adapter.
    state_key: str = ""

    def __init__(self, callback: Callback, cfg: RunConfig, run: RunDirectory) -> None:
        super().__init__(cfg, run)
        self._callback = callback
        self.state_key = type(callback).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state."""
        return self._callback.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback's state."""
        self._callback.load_state_dict(state_dict)

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def on_train_start(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_train_start(self._loop)

    def on_train_batch_start(self, *args: Any) -> None:
        """Hand on: what Lightning calls a batch is a global batch."""
        self._callback.on_step_start(self._loop)

    def on_train_batch_end(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_step_end(self._loop)

    def on_validation_batch_end(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_validation_batch_end(self._loop)

    def on_validation_epoch_end(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_validation_end(self._loop)

    def on_train_end(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_train_end(self._loop)

    def on_fit_end(self, *args: Any) -> None:
        """Hand on."""
        self._callback.on_end(self._loop)

    def on_exception(self, *args: Any) -> None:
        """Hand on, if training came that far."""
        if hasattr(self, "_loop"):
            self._callback.on_exception(self._loop)

    # ---- Megatron's hooks, called by NeMo ---------------------------------------------------------------------------

    def on_megatron_microbatch_end(self, step: Any, batch: Any, **kwargs: Any) -> None:
        """Hand on."""
        self._callback.on_micro_batch_end(self._loop, batch)

    def on_megatron_reduce_microbatches_end(self, microbatch_outputs: list[dict[str, Any]], **kwargs: Any) -> None:
        """Hand on."""
        self._callback.on_losses(self._loop, microbatch_outputs)
