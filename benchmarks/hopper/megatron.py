"""The engine's own model with Megatron's gradient buffers and optimizer, without a trainer around it: one rank."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass
from typing import Any

import torch

from nemo_prolong.config.schema import ModelConfig, OptimConfig, ParallelismConfig, PrecisionConfig, RecomputeConfig
from nemo_prolong.data.batch import PackedBatch

RECOMPUTE = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
_OPTIM = OptimConfig(lr=1e-5, min_lr=1e-6, lr_warmup_iters=0)


@functools.cache
def _import_engine() -> None:
    """Import NeMo, once, and leave its objects out of garbage collections, each of which takes 0.7 s with them."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    # Some imports of NeMo fail, and it keeps the errors with the frames that led to them: none may hold a model.
    import nemo_prolong.engine.model.nemo_model  # noqa: F401

    gc.collect()
    gc.freeze()


def start(device: torch.device) -> None:
    """Give Megatron its process groups and random states; once per process is enough."""
    _import_engine()
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if device.type == "cuda":
        tensor_parallel.model_parallel_cuda_manual_seed(1)


def build_model(model: ModelConfig, row_tokens: int, precision: PrecisionConfig, device: torch.device) -> Any:
    """Return the model of the engine in training mode, in bfloat16 where the precision is not fp32."""
    from megatron.core.transformer.module import Float16Module

    from nemo_prolong.engine.model.nemo_model import build_nemo_config

    start(device)
    torch.manual_seed(0)
    config = build_nemo_config(model, row_tokens, ParallelismConfig(), precision)
    # Billions of weights take a CPU a minute to draw.
    config.use_cpu_initialization = device.type != "cuda"
    module = config.configure_model(tokenizer=None).to(device).train()
    return Float16Module(config, module) if config.bf16 else module


@dataclass
class Trainable:
    """A model, its gradient buffers and its optimizer."""

    model: Any
    optimizer: Any

    @classmethod
    def build(cls, model: ModelConfig, row_tokens: int, precision: PrecisionConfig, device: torch.device) -> Trainable:
        """Return the model with buffers and optimizer as ``engine.training.trainer`` asks for them."""
        module = build_model(model, row_tokens, precision, device)
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import get_megatron_optimizer

        from nemo_prolong.engine.model.nemo_model import build_optimizer

        buffers = DistributedDataParallelConfig(
            check_for_nan_in_grad=False,
            average_in_collective=False,
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
        )
        wrapped = DistributedDataParallel(module.config, buffers, module)
        config = build_optimizer(_OPTIM, train_iters=1000, bf16=module.config.bf16).config
        return cls(wrapped, get_megatron_optimizer(config, [wrapped]))

    def forward_backward(self, batch: PackedBatch) -> torch.Tensor:
        """Add the gradients of one micro-batch to the buffers and return its mean loss."""
        from megatron.core.distributed import finalize_model_grads

        from nemo_prolong.engine.training.packed_step import ExactLossReduction, packed_forward_step

        here = self.model.config.data_step_fn(iter([batch]))
        loss_sum, targets, _ = ExactLossReduction().forward(here, packed_forward_step(self.model, here))
        loss_sum.backward()
        mean = loss_sum.detach() / targets
        finalize_model_grads([self.model], targets)
        return mean

    def step(self, batch: PackedBatch) -> torch.Tensor:
        """Take one optimizer step on one micro-batch and return its mean loss."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        mean = self.forward_backward(batch)
        self.optimizer.step()
        return mean
