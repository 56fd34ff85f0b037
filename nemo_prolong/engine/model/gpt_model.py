"""Megatron's GPT model with the two steps that decide exactness: the positions going in, the loss coming out.

``ExactModelConfig.model_class`` names the class. ``engine.patches.model_class`` has NeMo build it. State-dict and
checkpoint names stay Megatron's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from nemo.collections import llm
from nemo.collections.llm.gpt.model.llama import apply_rope_scaling

from nemo_prolong.config.schema import RopeScaling
from nemo_prolong.engine.te.environment import forbid_unfused_kernels, forget_kernels
from nemo_prolong.engine.training.packed_step import DocumentSeqParams
from nemo_prolong.ops.linear_cross_entropy import HeadLoss, linear_cross_entropy
from nemo_prolong.ops.rotary import rotary_factors

_SHARDED_DIMS = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
"""Layers of Megatron whose weights TP ranks share, and the dim that is cut."""


class ExactLossGPTModel(GPTModel):
    """Megatron's GPT model whose LM head goes with the cross-entropy, a chunk of tokens at a time."""

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | HeadLoss:
        """Return the losses where there are labels, else what Megatron returns: hidden states or logits.

        Args:
            hidden_states: [T, 1, E]; with sequence parallelism this rank's slice [T / TP, 1, E].
            *args: Megatron's, in its order.
            labels: int64 [1, T].
            loss_mask: Factor of each token's loss [1, T].
            **kwargs: Megatron's.
        """
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        assert loss_mask is not None and hidden_states.size(1) == len(labels) == 1, (hidden_states.shape, labels.shape)
        head = self.output_layer
        _before_forward(head)
        return linear_cross_entropy(
            hidden_states.squeeze(1),
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else head.weight,
            labels.flatten(),
            loss_mask.flatten(),
            vocab_size=self.config.real_vocab_size,
            tp_group=head.tp_group,
            sequence_parallel=head.sequence_parallel,
            accumulate_into_main_grad=True,
        )


def _before_forward(module: torch.nn.Module) -> None:
    """Run what is to run before a module that is not called itself.

    With ``overlap_param_gather`` Megatron waits there for the weights of the module. Without this the LM head would
    read those of the step before, and the next gather would find this one unfinished.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


class DocumentPositionsGPTModel(ExactLossGPTModel):
    """The model of both backends: RoPE angles are looked up by position, once per forward pass, with their sines.

    Megatron's torch RoPE of packed rows reads the document boundaries back to the host in every layer, and restarts
    positions at a document only if the longest document is shorter than the row, which changes the rounding.
    """

    def forward(self, *args: Any, packed_seq_params: DocumentSeqParams, **kwargs: Any) -> torch.Tensor | HeadLoss:
        """Return what Megatron's forward returns; boundaries reach the core attention and nothing before it."""
        withheld: dict[str, Any] = {"cu_seqlens_q": None, "cu_seqlens_kv": None}
        hidden = dataclasses.replace(packed_seq_params, **withheld)
        return super().forward(*args, packed_seq_params=hidden, **kwargs)

    def _preprocess(self, input_ids: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what Megatron does, with the RoPE factors of this rank's tokens instead of the table of angles.

        Args:
            input_ids: int64 [1, T].
            position_ids: Positions inside the documents, int64 [1, T].
            *args: Megatron's, in its order.
            **kwargs: Megatron's.
        """
        decoder_input, table, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        angles = table[:, 0].index_select(0, position_ids.flatten())
        return decoder_input, rotary_factors(angles, self.config.params_dtype), *rest


def scaled_frequencies(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Return the RoPE frequencies of Llama-3.1.

    Args:
        inv_freq: float32 [C / 2], radians per position.
        scaling: What Hugging Face calls ``rope_type: llama3``.
    """
    return apply_rope_scaling(
        inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        old_context_len=scaling.original_max_position_embeddings,
    )


def _mark_shards(model: torch.nn.Module) -> None:
    """Say which weights are shards of TP ranks.

    Megatron says it while it draws them. Without it the norm of the gradient counts a shard on the first TP rank only.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for kind, dim in _SHARDED_DIMS.items():
            if isinstance(module, kind) and weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


@torch.no_grad()
def _fill_with_nan(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.fill_(torch.nan)


@dataclasses.dataclass
class ExactModelConfig:
    """What ours adds to a NeMo model configuration.

    Attributes:
        real_vocab_size: Vocabulary without padding: padded columns of the LM head take no part in the loss, as they
            take none in the exported model. None where the embedding is not padded.
        model_class: The class of the model, a subclass of Megatron's.
        rope_scaling: Llama-3.1's scaling of the RoPE frequencies, or None. Megatron's own switch knows one original
            context only, and NeMo's class for Llama-3.1 changes other settings too.
    """

    real_vocab_size: int | None = None
    model_class: type[GPTModel] = DocumentPositionsGPTModel
    rope_scaling: RopeScaling | None = None

    def configure_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """Return the model that NeMo builds, of our class and with our frequencies. Needs ``patches.prepare``.

        Without ``perform_initialization`` every parameter is NaN until it is restored, norms too. What a restore leaves
        out is then found, and not trained.
        """
        forget_kernels()
        model = super().configure_model(*args, **kwargs)  # type: ignore[misc]
        forbid_unfused_kernels()
        assert type(model) is self.model_class, type(model)
        if not self.perform_initialization:  # type: ignore[attr-defined]
            _mark_shards(model)
            _fill_with_nan(model)
        if self.rope_scaling is not None:
            rotary = model.rotary_pos_emb
            rotary.inv_freq = scaled_frequencies(rotary.inv_freq, self.rope_scaling)
        return model


@dataclasses.dataclass
class LlamaConfig(ExactModelConfig, llm.LlamaConfig):
    """NeMo's Llama."""


@dataclasses.dataclass
class Llama3Config8B(ExactModelConfig, llm.Llama3Config8B):
    """NeMo's Llama-3 8B."""
