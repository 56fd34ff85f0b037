"""The shape of a model."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from nemo_prolong.config.schema.base import MAX_ROW_TOKENS, Parts, Section, ShownText

NemoConfig = Literal["LlamaConfig", "Llama3Config8B"]
"""The classes that the engine has its own layers and loss for."""


class RopeScaling(Section):
    """Llama-3.1's change of the RoPE frequencies (Hugging Face: ``rope_type: llama3``); the slow ones are divided."""

    factor: Annotated[float, Field(ge=1.0, le=1e6)]
    """Divides the frequencies whose wavelength is longer than the original context / ``low_freq_factor``."""
    low_freq_factor: Annotated[float, Field(gt=0.0, le=1e6)]
    """See ``factor``."""
    high_freq_factor: Annotated[float, Field(gt=0.0, le=1e6)]
    """Wavelengths shorter than the original context / this stay as they are; between the two it is interpolated."""
    original_max_position_embeddings: Annotated[int, Field(gt=0, le=MAX_ROW_TOKENS)]
    """The original context, in tokens."""


class ModelConfig(Section):
    """A Llama model, in the words of NeMo's ``LlamaConfig``."""

    name: Annotated[ShownText, Field(min_length=1)]
    """What the model is called in manifests, reports and the model card."""
    nemo_config: NemoConfig
    """Class of ``nemo.collections.llm`` that supplies everything not set here."""
    num_layers: Parts
    """Transformer layers."""
    hidden_size: Parts
    """Width of the residual stream."""
    ffn_hidden_size: Parts
    """Width of the SwiGLU block."""
    num_attention_heads: Parts
    """Query heads."""
    num_query_groups: Parts
    """Key and value heads (grouped-query attention)."""
    kv_channels: Parts
    """Dimensions of one head."""
    vocab_size: Annotated[int, Field(gt=0, le=2**24)]
    """Real vocabulary, as in the exported ``config.json``: at least the tokenizer's, with its added tokens. It may be
    larger than that of ``parent=hf:DIR``."""
    make_vocab_size_divisible_by: Parts = 128
    """The embedding is padded to a multiple of this times TP; the padding is dropped at export."""
    rotary_base: Annotated[float, Field(gt=1.0, le=1e12)]
    """RoPE base (Hugging Face: ``rope_theta``). Above 1e12 the slow dimensions do not turn within any row."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the RoPE frequencies as in Llama-3.1 and 3.2; null for none, as in Llama-3 and ProLong."""
    layernorm_epsilon: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-5
    """Epsilon of RMSNorm. Activations are about 1, and a larger one would outweigh them."""
    init_method_std: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Standard deviation of the initial weights when trained from scratch. Above 1 each layer multiplies its input."""
    share_embeddings_and_output_weights: bool = False
    """Tie the LM head to the embedding."""
    license: ShownText = ""
    """Licence of the base model, for the model card; empty where it is not known."""

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the rows of the embedding as Megatron pads it for this TP."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple
