"""NeMo's trainer for one stage: strategy, precision, callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from torch.distributed import Store

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.engine.checkpoint.hf_restore import HuggingFaceRestore
from nemo_prolong.engine.checkpoint.megatron_io import StageCheckpointIO
from nemo_prolong.engine.checkpoint.non_finite import check_parameters
from nemo_prolong.engine.checkpoint.optimizer_state import initialize_moments
from nemo_prolong.engine.model.nemo_model import params_dtype
from nemo_prolong.engine.patches.process_groups import hierarchical_context_parallel
from nemo_prolong.engine.te.fp8 import mixed_precision
from nemo_prolong.engine.training.launched_rank import LaunchedRank

_STATE_OF_THE_STAGE = ("lr", "initial_lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")


class StageStrategy(nl.MegatronStrategy):
    """Megatron's strategy with four differences.

    Optimizer state brings no hyperparameters along, neither a parent's nor this run's own. Moments, fp32 weights and
    the step counter of Adam are taken. Learning rate, decay and betas are those of the configuration. It can be saved
    before the first step. Megatron's random states exist on CPU too. The groups of hierarchical context parallelism are
    formed.
    """

    hierarchical_context_parallel_sizes: list[int] | None = None
    """See ``ParallelismConfig``; set before the process groups are formed."""

    def setup_distributed(self) -> None:
        """Form the process groups; seed the random states that sequence parallelism asks for."""
        with hierarchical_context_parallel(self.hierarchical_context_parallel_sizes):
            super().setup_distributed()
        if not torch.cuda.is_available():
            # NeMo seeds them where there is a GPU only. Nothing is drawn from them: Llama has no dropout.
            get_cuda_rng_tracker().set_states({"model-parallel-rng": torch.get_rng_state()})

    def selective_restore(self) -> None:
        """Take what the stage takes from its parent; a Hugging Face directory is read to where its tensors belong."""
        if not isinstance(self.restore_config, HuggingFaceRestore):
            super().selective_restore()
            return
        self.restore_config.load(self.megatron_parallel.sharded_state_dict())
        self._check_restored(f"parent=hf:{self.restore_config.path}")
        for optimizer in self.optimizers:
            optimizer.reload_model_params()
        self.barrier("hf_import")

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, of this run or of a parent."""
        super().load_model_state_dict(checkpoint, strict=strict)
        self._check_restored(f"parent={self.restore_config.path}" if self.restore_config else "the checkpoint")

    def _check_restored(self, what: str) -> None:
        """Refuse weights that are NaN or infinite. What is not restored stays NaN, see ``ExactModelConfig``."""
        check_parameters(self.megatron_parallel.named_parameters(), what)

    def optimizer_sharded_state_dict(self, is_loading: bool = False, metadata: Any = None) -> Any:
        """Return Megatron's description of the optimizer state, see ``MegatronStrategy``."""
        if not is_loading:
            for optimizer in self.optimizers:
                initialize_moments(optimizer.mcore_optimizer)
        return super().optimizer_sharded_state_dict(is_loading=is_loading, metadata=metadata)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        """Load optimizer state, of this run or, with ``selective_restore``, of a parent."""
        kept = [_hyperparameters(group) for optimizer in self.optimizers for group in optimizer.param_groups]
        super().load_optimizer_state_dict(checkpoint, selective_restore=selective_restore)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, hyperparameters in zip(groups, kept, strict=True):
            group.update(hyperparameters)


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in _STATE_OF_THE_STAGE if key in group}


def build_strategy(cfg: RunConfig, store: Store, restore: RestoreConfig | None = None) -> StageStrategy:
    """Return Megatron's strategy for the layout of the configuration.

    Args:
        cfg: The stage.
        store: Where the ranks meet to form the process groups.
        restore: What to take from a parent's checkpoint when training starts; None trains from scratch or resumes.
    """
    parallelism = cfg.parallelism
    on_gpu = torch.cuda.is_available()
    strategy = StageStrategy(
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        context_parallel_size=parallelism.context_parallel_size,
        sequence_parallel=parallelism.sequence_parallel,
        pipeline_dtype=params_dtype(cfg.precision),
        process_group_backend="nccl" if on_gpu else "gloo",
        ddp=DistributedDataParallelConfig(
            # It would end one rank; the step guard has all of them skip the step.
            check_for_nan_in_grad=False,
            # Gradients are sums until the end of the step, where they are divided by the target tokens of all ranks.
            average_in_collective=False,
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=cfg.optim.use_distributed_optimizer,
        ),
        # The checkpoint writer completes its saves itself, in the background too.
        ckpt_async_save=False,
        checkpoint_io=StageCheckpointIO(parallel_load=on_gpu),
        # The next stage may have another TP, PP or CP, and takes the optimizer state with it.
        ckpt_optim_fully_reshardable=True,
        restore_config=restore,
        replace_progress_bar=False,
    )
    strategy.store = store
    strategy.hierarchical_context_parallel_sizes = parallelism.hierarchical_context_parallel_sizes
    return strategy


def build_trainer(
    cfg: RunConfig,
    callbacks: Sequence[pl.Callback],
    *,
    validate: bool,
    store: Store,
    restore: RestoreConfig | None = None,
) -> nl.Trainer:
    """Return the trainer of a stage.

    Args:
        cfg: The stage.
        callbacks: Metrics, checkpoints and the like.
        validate: Whether there is a validation set.
        store: See ``build_strategy``.
        restore: See ``build_strategy``.
    """
    on_gpu = torch.cuda.is_available()
    place = RankEnvironment.current()
    plugins: list[Any] = [LaunchedRank(place)]
    if params_dtype(cfg.precision) == torch.bfloat16:
        plugins.append(mixed_precision(cfg.precision))
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=place.local_world_size,
        num_nodes=place.num_nodes,
        strategy=build_strategy(cfg, store, restore),
        max_steps=cfg.train.train_iters,
        val_check_interval=cfg.train.val_check_interval if validate else None,
        limit_val_batches=_validation_micro_batches(cfg, place.world_size) if validate else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=cfg.run_dir,
        plugins=plugins,
    )


def _validation_micro_batches(cfg: RunConfig, world_size: int) -> int:
    """Return what Lightning counts as batches: micro-batches of one rank."""
    data_parallel_size = world_size // cfg.parallelism.model_parallel_size
    per_rank = cfg.train.global_batch_size // (cfg.train.micro_batch_size * data_parallel_size)
    return cfg.train.limit_val_batches * per_rank
