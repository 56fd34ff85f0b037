"""The torch layer specification: Megatron's own layers with our document attention in the middle.

State-dict and checkpoint names are those of Megatron's local specification, whose distributed-checkpoint keys equal
Transformer Engine's, so that a checkpoint written on CPU loads in a Transformer Engine model.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_prolong.engine.training.packed_step import DocumentSeqParams
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel import context_parallel_attention


class DocumentAttention(MegatronModule):
    """Megatron core attention for packed rows, in plain torch.

    Megatron's own torch attention refuses packed rows and context parallelism. This one needs packed rows: every call
    brings ``packed_seq_params``, with the partition of the row where ranks share it. Arguments are those of every
    Megatron core attention; the unused ones are part of that interface.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        assert attention_type == "self", attention_type
        self.softmax_scale = softmax_scale
        self.cp_comm_type = cp_comm_type or "p2p"
        self.cp_group = pg_collection.cp if pg_collection is not None else get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: DocumentSeqParams,
        attention_bias: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Return attention inside documents, [T, H * C].

        Args:
            query: [T, H, C]; H and K count the heads of this tensor-parallel rank.
            key: [T, K, C].
            value: [T, K, C].
            attention_mask: Unused, documents are the mask.
            packed_seq_params: Document boundaries of the row, and its partition over context-parallel ranks.
            attention_bias: Must be None.
            **unused: The type of the mask, which is causal.
        """
        partition, boundaries = packed_seq_params.partition, packed_seq_params.cu_seqlens
        assert boundaries is not None and attention_bias is None
        if partition is None:
            longest = packed_seq_params.max_seqlen_q
            output = document_attention(query, key, value, boundaries, self.softmax_scale, max_seqlen=longest)
        else:
            output = context_parallel_attention(
                query, key, value, partition, self.cp_group, self.cp_comm_type, self.softmax_scale
            )
        return output.flatten(1)


class RMSNorm(torch.nn.RMSNorm):
    """Megatron's norm in plain torch, under sequence parallelism too, which Megatron's own torch norm refuses.

    Every rank normalises its own tokens. Marked weights have their gradients summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.config = config
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def torch_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage; NeMo calls it with the model's configuration.

    Args:
        config: The model.
        vp_stage: Virtual pipeline stage, or None.
    """
    assert config.normalization == "RMSNorm", config.normalization
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = DocumentAttention
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)
