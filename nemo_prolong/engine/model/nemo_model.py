"""From our configuration to NeMo's: the model class, its config and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from nemo_prolong.config.rules.constraints import resolve_backend
from nemo_prolong.config.schema import (
    KernelBackend,
    ModelConfig,
    OptimConfig,
    ParallelismConfig,
    PrecisionConfig,
    RunConfig,
)
from nemo_prolong.engine.model.gpt_model import Llama3Config8B, LlamaConfig
from nemo_prolong.engine.model.torch_layers import torch_layer_spec
from nemo_prolong.engine.platform import current_platform
from nemo_prolong.engine.te.layers import te_fields
from nemo_prolong.engine.training.packed_step import ExactLossReduction, packed_data_step, packed_forward_step
from nemo_prolong.engine.training.schedule import WarmupCosine
from nemo_prolong.errors import ConfigError

_NEMO_CONFIGS = {"LlamaConfig": LlamaConfig, "Llama3Config8B": Llama3Config8B}

# Fused kernels of CUDA, apex and Transformer Engine; without them Megatron runs the same formulas in torch.
_TORCH_FIELDS: dict[str, Any] = {
    "transformer_layer_spec": torch_layer_spec,
    "data_step_fn": packed_data_step,
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
}


class PackedLlamaModel(llm.LlamaModel):
    """NeMo's Llama with the exact loss in training and validation.

    Args:
        config: NeMo's configuration of the model.
        optim: The optimizer.
        loss_average: ``train.loss_average``; validation is exact whatever it says.
    """

    def __init__(self, config: GPTConfig, optim: MegatronOptimizerModule, loss_average: str) -> None:
        super().__init__(config, optim=optim)
        self.loss_average = loss_average

    def forward(self, **inputs: Any) -> Any:
        """Return what the GPT model returns for these inputs; NeMo's own forward knows no ``loss_mask``."""
        return self.module(**inputs)

    @property
    def training_loss_reduction(self) -> ExactLossReduction:
        """Sum of token losses over the micro-batch, or for ablation ProLong's average over devices."""
        return ExactLossReduction(per_device=self.loss_average == "per_device")

    @property
    def validation_loss_reduction(self) -> ExactLossReduction:
        """The same sum: a validation loss is the mean over all its target tokens."""
        return ExactLossReduction(validation_step=True)


def params_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the dtype of weights and activations outside FP8 kernels."""
    return torch.float32 if precision.compute == "fp32" else torch.bfloat16


def build_nemo_config(
    model: ModelConfig,
    seq_length: int,
    parallelism: ParallelismConfig,
    precision: PrecisionConfig,
    *,
    restored: bool = False,
) -> GPTConfig:
    """Return NeMo's configuration of the model.

    Args:
        model: The model.
        seq_length: Tokens of a row.
        parallelism: Its layout.
        precision: Its formats and kernels.
        restored: Weights come from a parent or a checkpoint. None are drawn, which takes a rank minutes at full size.

    Raises:
        ConfigError: If the class cannot be had.
    """
    if model.nemo_config not in _NEMO_CONFIGS:
        raise ConfigError(
            f"model.nemo_config={model.nemo_config}",
            f"the classes that may be named here are {', '.join(_NEMO_CONFIGS)}.",
            "Set model.nemo_config=LlamaConfig.",
        )
    dtype = params_dtype(precision)
    backend = resolve_backend(precision, current_platform())
    return _NEMO_CONFIGS[model.nemo_config](
        **_architecture(model),
        seq_length=seq_length,
        vocab_size=model.padded_vocab_size(parallelism.tensor_model_parallel_size),
        real_vocab_size=model.vocab_size,
        rope_scaling=model.rope_scaling,
        forward_step_fn=packed_forward_step,
        perform_initialization=not restored,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        cp_comm_type=parallelism.cp_comm_type,
        # Padding of documents makes rows of different lengths out of equal ones.
        variable_seq_lengths=parallelism.context_parallel_size > 1 and parallelism.pipeline_model_parallel_size > 1,
        # There are no experts, but Megatron refuses its own default together with rows of different lengths.
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - no password
        **precision.recompute.model_dump(),
        **precision.offload.model_dump(),
        **(te_fields(precision) if backend is KernelBackend.TE else _TORCH_FIELDS),
    )


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of the model that NeMo calls by the same name."""
    ours_alone = {"name", "nemo_config", "vocab_size", "license", "rope_scaling"}
    return model.model_dump(exclude=ours_alone)


def build_optimizer(optim: OptimConfig, train_iters: int, *, bf16: bool) -> MegatronOptimizerModule:
    """Return Megatron's AdamW with the recipe's schedule."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=optim.use_distributed_optimizer,
    )
    schedule = WarmupCosine(
        train_iters=train_iters, warmup_iters=optim.lr_warmup_iters, min_lr_ratio=optim.min_lr / optim.lr
    )
    return MegatronOptimizerModule(config, lr_scheduler=schedule)


def build_model(cfg: RunConfig, *, restored: bool) -> PackedLlamaModel:
    """Return the model with its optimizer, not yet built on a device.

    Args:
        cfg: The stage.
        restored: See ``build_nemo_config``.
    """
    nemo_config = build_nemo_config(cfg.model, cfg.seq_length, cfg.parallelism, cfg.precision, restored=restored)
    optimizer = build_optimizer(cfg.optim, cfg.train.train_iters, bf16=nemo_config.bf16)
    return PackedLlamaModel(nemo_config, optimizer, cfg.train.loss_average)
