"""The Transformer Engine layer specification: Megatron's own, with our attention in the middle and our norm at the end.

Parameter names are Transformer Engine's (norms inside the linear layers). Checkpoint keys are the torch backend's.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_prolong.config.schema import PrecisionConfig
from nemo_prolong.engine.model.torch_layers import RMSNorm
from nemo_prolong.engine.te.data_step import data_step_of
from nemo_prolong.engine.te.fp8 import fp8_fields


def te_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage; NeMo calls it with the model's configuration.

    Args:
        config: The model.
        vp_stage: Virtual pipeline stage, or None.
    """
    from nemo_prolong.engine.te.attention import TEDocumentAttention

    assert config.normalization == "RMSNorm", config.normalization
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = TEDocumentAttention
    num_layers = get_num_layers_to_build(config, vp_stage)
    # The final norm of Transformer Engine would add FP8 state to the checkpoint, which the torch backend has not.
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


_ATTENTION_BACKENDS = {"auto": AttnBackend.auto, "cudnn": AttnBackend.fused, "flash": AttnBackend.flash}
"""``precision.attention`` as Megatron calls it."""


def te_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the fields of NeMo's model configuration that choose this backend; fusions not named are NeMo's choice."""
    return {
        "transformer_layer_spec": te_layer_spec,
        "data_step_fn": data_step_of(precision),
        "use_cpu_initialization": False,
        "attention_backend": _ATTENTION_BACKENDS[precision.attention],
        # Angles are looked up by position. The fused kernel for packed rows starts one block per document and position
        # of the longest document, nearly all of them idle in a row of one long and many short documents.
        "apply_rope_fusion": False,
        # The LM head goes with its own cross-entropy.
        "cross_entropy_loss_fusion": False,
        # FP8 attention of a row is the business of the ranks that share it: only they agree on which rows have it.
        "tp_only_amax_red": precision.compute == "fp8_attention",
        **fp8_fields(precision),
    }
