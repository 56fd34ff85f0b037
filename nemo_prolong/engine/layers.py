"""The torch layer specification: Megatron's own layers with our document attention in the middle.

State-dict and checkpoint names are those of Megatron's local specification, whose distributed-checkpoint keys equal
Transformer Engine's, so that a checkpoint written on CPU loads in a Transformer Engine model.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_prolong.ops.attention import document_attention


class DocumentAttention(MegatronModule):
    """Megatron core attention for packed rows, in plain torch.

    Megatron's own torch attention refuses packed rows. This one needs them: every call brings ``packed_seq_params``.
    Arguments are those of every Megatron core attention; the unused ones are part of that interface.
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
        # The exchange between context-parallel ranks belongs here: keys and values of a document are on several ranks.
        assert config.context_parallel_size == 1, config.context_parallel_size
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return attention inside documents, [T, H * C].

        Args:
            query: [T, H, C], H heads of this tensor-parallel rank.
            key: [T, K, C].
            value: [T, K, C].
            attention_mask: Unused, documents are the mask.
            attn_mask_type: Unused, attention is causal.
            attention_bias: Must be None.
            packed_seq_params: Document boundaries of the row.
        """
        assert packed_seq_params is not None and attention_bias is None
        output = document_attention(query, key, value, packed_seq_params.cu_seqlens_q, self.softmax_scale)
        return output.flatten(1)


def torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the layer specification of the torch backend; NeMo calls it with the model's configuration."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = DocumentAttention
    return spec
