"""Megatron's tensors and Hugging Face's, both ways: names, shapes, and the cuts between them.

Megatron fuses what Hugging Face keeps apart: queries, keys and values in one matrix, ordered by query group, and gate
and up in another. Everything here is a pure function of tensors, exact to the bit; ``join`` undoes ``split``. Letters:
H query heads, K key-value heads (query groups), C dimensions of a head, E hidden size, F ffn hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_prolong.config.schema import ModelConfig

Shape = tuple[int, ...]


def split_qkv(fused: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Cut Megatron's fused projection into Hugging Face's three.

    Args:
        fused: [(H + 2K) * C, E]; for each query group its H/K query heads, then its key head, then its value head.
        model: Sizes.

    Returns:
        Queries [H * C, E], keys [K * C, E], values [K * C, E].
    """
    heads_per_group = model.num_attention_heads // model.num_query_groups
    grouped = fused.reshape(model.num_query_groups, heads_per_group + 2, model.kv_channels, fused.shape[1])
    query, key, value = grouped.split([heads_per_group, 1, 1], dim=1)
    return query.reshape(-1, fused.shape[1]), key.reshape(-1, fused.shape[1]), value.reshape(-1, fused.shape[1])


def join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Undo ``split_qkv``."""
    grouped = [part.reshape(model.num_query_groups, -1, model.kv_channels, part.shape[1]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, parts[0].shape[1])


def split_gate_up(fused: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cut [2F, E] into gate [F, E] and up [F, E]."""
    gate, up = fused.split(model.ffn_hidden_size)
    return gate, up


def join_gate_up(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Undo ``split_gate_up``."""
    return torch.cat(list(parts))


def drop_padding(padded: Tensor, model: ModelConfig) -> tuple[Tensor]:
    """Cut the rows that tensor parallelism added: [padded V, E] to [V, E]."""
    return (padded[: model.vocab_size],)


def _same(tensor: Tensor, model: ModelConfig) -> tuple[Tensor]:
    return (tensor,)


def _only(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Rule:
    """How one Megatron tensor becomes Hugging Face tensors, and back.

    Attributes:
        megatron: Name in the checkpoint.
        hugging_face: Names, with ``{layer}`` where there is one per layer.
        shapes: Shapes of the Hugging Face tensors.
        split: From the Megatron tensor (of one layer) to the Hugging Face ones.
        join: The reverse. The padding of a vocabulary is lost: [V, E] comes back.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    shapes: Callable[[ModelConfig], tuple[Shape, ...]]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]] = _same
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor] = _only

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint holds all layers in one tensor, stacked in dim 0."""
        return self.megatron.startswith("decoder.layers.")


@dataclass(frozen=True)
class Piece:
    """One Megatron tensor of one layer, with the Hugging Face tensors it becomes.

    Attributes:
        rule: The mapping.
        layer: Layer, or None for a tensor outside the layers.
        names: Hugging Face names.
        shapes: Their shapes, in the order of ``names``.
    """

    rule: Rule
    layer: int | None
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]


def _attention_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    key_value = (model.num_query_groups * model.kv_channels, model.hidden_size)
    return (model.num_attention_heads * model.kv_channels, model.hidden_size), key_value, key_value


def _norm_shape(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.hidden_size,),)


def _vocabulary_shape(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.vocab_size, model.hidden_size),)


_EMBEDDING = Rule(
    "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _vocabulary_shape, drop_padding
)  # fmt: skip
_FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _norm_shape)
_LM_HEAD = Rule("output_layer.weight", ("lm_head.weight",), _vocabulary_shape, drop_padding)
_LAYER = (
    Rule(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        _norm_shape,
    ),
    Rule(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
        _attention_shapes,
        split_qkv,
        join_qkv,
    ),
    Rule(
        "decoder.layers.self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
        lambda model: ((model.hidden_size, model.num_attention_heads * model.kv_channels),),
    ),
    Rule(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        _norm_shape,
    ),
    Rule(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        lambda model: ((model.ffn_hidden_size, model.hidden_size),) * 2,
        split_gate_up,
        join_gate_up,
    ),
    Rule(
        "decoder.layers.mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",),
        lambda model: ((model.hidden_size, model.ffn_hidden_size),),
    ),
)


def rules(model: ModelConfig) -> tuple[Rule, ...]:
    """Return the rule of every tensor that a checkpoint of the model holds; a tied LM head is not one of them."""
    head = () if model.share_embeddings_and_output_weights else (_LM_HEAD,)
    return (_EMBEDDING, *_LAYER, _FINAL_NORM, *head)


def pieces(model: ModelConfig) -> Iterator[Piece]:
    """Yield every Megatron tensor of the model once, layer by layer in the order of the forward pass."""
    yield _piece(_EMBEDDING, None, model)
    for layer in range(model.num_layers):
        for rule in _LAYER:
            yield _piece(rule, layer, model)
    yield _piece(_FINAL_NORM, None, model)
    if not model.share_embeddings_and_output_weights:
        yield _piece(_LM_HEAD, None, model)


def _piece(rule: Rule, layer: int | None, model: ModelConfig) -> Piece:
    return Piece(rule, layer, tuple(name.format(layer=layer) for name in rule.hugging_face), rule.shapes(model))
