"""Core attention by Transformer Engine for packed rows. Importing this module imports Transformer Engine."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_prolong.engine.training.packed_step import DocumentSeqParams
from nemo_prolong.ops.batch_of_documents import as_batch, runs_in_fp8


class _StatelessAttention(TEDotProductAttention):
    """Transformer Engine's attention without an entry in checkpoints.

    Its state is the FP8 scales, which Megatron leaves out of distributed checkpoints anyway: they are found again
    within the first rows.
    """

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class TEDocumentAttention(_StatelessAttention):
    """Attention inside the documents of a packed row.

    A row runs in BF16 as ``thd`` with its document boundaries. With ``fp8_dot_product_attention`` a row of equal
    documents runs in FP8 as a batch instead, through a second module. Transformer Engine remembers on a module whether
    its last forward pass ran in FP8, and recomputation believes it. One module for both would mix up the micro-batches
    of a pipeline.

    Args:
        config: The model.
        **arguments: Those of every Megatron core attention.
    """

    def __init__(self, config: TransformerConfig, **arguments: Any) -> None:
        super().__init__(config=config, **arguments)
        assert self.attention_type == "self", self.attention_type
        self.fp8_attention = None
        if config.fp8 and config.fp8_dot_product_attention:
            self.fp8_attention = _StatelessAttention(config=config, **arguments)

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
        """Return attention inside documents, [T, H * C]; arguments are those of ``DocumentAttention.forward``."""
        assert attention_bias is None
        documents = packed_seq_params.equal_documents
        fits = runs_in_fp8(documents, len(query), self.config.context_parallel_size)
        if self.fp8_attention is not None and documents is not None and fits:
            batch = [as_batch(tensor, documents) for tensor in (query, key, value)]
            one_length = PackedSeqParams(qkv_format="bshd")
            output = self.fp8_attention(*batch, None, AttnMaskType.causal, packed_seq_params=one_length)
            return output.flatten(0, 1)
        # FP8 is left around the attention: its scales would otherwise be kept, and reduced over ranks, for nothing.
        outside_fp8 = te.autocast(enabled=False) if self.config.fp8 else contextlib.nullcontext()
        with outside_fp8:
            return super().forward(
                query, key, value, None, AttnMaskType.causal, packed_seq_params=_packed(packed_seq_params)
            )


def _packed(params: DocumentSeqParams) -> PackedSeqParams:
    """Return what Transformer Engine reads of a packed row.

    Padding belongs to its document, so that there is one list of boundaries, and no padding between documents to mask.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=params.cu_seqlens,
        cu_seqlens_kv=params.cu_seqlens,
        max_seqlen_q=params.max_seqlen_q,
        max_seqlen_kv=params.max_seqlen_kv,
    )
