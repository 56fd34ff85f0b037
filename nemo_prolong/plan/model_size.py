"""Count the parameters of a Llama model, exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nemo_prolong.config.schema import ModelConfig


class ModelSize(NamedTuple):
    """Parameters by part, over all layers. The vocabulary is the real one, without Megatron's padding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters, as ``transformers`` counts them."""
        return sum(self)

    @property
    def in_matrix_products(self) -> int:
        """Parameters that every token is multiplied with. These are all but the embedding table and the norms."""
        return self.attention + self.mlp + self.head


def model_size(model: ModelConfig) -> ModelSize:
    """Return the parameters of ``model``. A tied head has none of its own but is still multiplied with."""
    hidden, layers = model.hidden_size, model.num_layers
    query = model.num_attention_heads * model.kv_channels
    key_value = model.num_query_groups * model.kv_channels
    vocabulary = model.vocab_size * hidden
    return ModelSize(
        embedding=0 if model.share_embeddings_and_output_weights else vocabulary,
        attention=layers * hidden * (2 * query + 2 * key_value),
        mlp=layers * hidden * 3 * model.ffn_hidden_size,
        norms=(2 * layers + 1) * hidden,
        head=vocabulary,
    )
