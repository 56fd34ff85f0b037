"""The shape of a model."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveInt

from nemo_prolong.config.schema.base import Section


class RopeScaling(Section):
    """Llama-3.1's change of the RoPE frequencies (Hugging Face: ``rope_type: llama3``); the slow ones are divided."""

    factor: Annotated[float, Field(ge=1.0)]
    """Divides the frequencies whose wavelength is longer than the original context / ``low_freq_factor``."""
    low_freq_factor: Annotated[float, Field(gt=0.0)]
    """See ``factor``."""
    high_freq_factor: Annotated[float, Field(gt=0.0)]
    """Wavelengths shorter than the original context / this stay as they are; between the two it is interpolated."""
    original_max_position_embeddings: PositiveInt
    """The original context, in tokens."""


class ModelConfig(Section):
    """A Llama model, in the words of NeMo's ``LlamaConfig``."""

    name: str
    """What the model is called in manifests, reports and the model card."""
    nemo_config: str
    """Class in ``nemo.collections.llm`` that supplies everything not set here: LlamaConfig, Llama3Config8B, ..."""
    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU block."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt
    """Key and value heads (grouped-query attention)."""
    kv_channels: PositiveInt
    """Dimensions of one head."""
    vocab_size: PositiveInt
    """Real vocabulary, as in the exported ``config.json``: at least the tokenizer's, with its added tokens. It may be
    larger than that of ``parent=hf:DIR``."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this times TP; the padding is dropped at export."""
    rotary_base: Annotated[float, Field(gt=1.0)]
    """RoPE base (Hugging Face: ``rope_theta``)."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the RoPE frequencies as in Llama-3.1 and 3.2; null for none, as in Llama-3 and ProLong."""
    layernorm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    """Epsilon of RMSNorm."""
    init_method_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of the initial weights when trained from scratch."""
    share_embeddings_and_output_weights: bool = False
    """Tie the LM head to the embedding."""
    license: str = ""
    """Licence of the base model, for the model card."""

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the rows of the embedding as Megatron pads it for this TP."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple
