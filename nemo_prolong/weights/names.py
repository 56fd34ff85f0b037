"""Megatron's tensors and Hugging Face's: names, shapes, and which rows of one are which rows of the other.

Megatron fuses what Hugging Face keeps apart: queries, keys and values in one matrix, ordered by query group, and gate
and up in another. A fused tensor is described by its row ranges, in order. Export cuts along them and import gathers
along them, so the two cannot differ. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nemo_prolong.config.schema import ModelConfig

Shape = tuple[int, ...]


class RowRange(NamedTuple):
    """Consecutive rows of a Megatron tensor that are consecutive rows of one Hugging Face tensor.

    Attributes:
        start: First row in the Megatron tensor.
        num_rows: Rows.
        part: Which of the Hugging Face tensors.
        part_start: First row in that one.
    """

    start: int
    num_rows: int
    part: int
    part_start: int

    @property
    def end(self) -> int:
        """The row after the last in the Megatron tensor."""
        return self.start + self.num_rows


@dataclass(frozen=True)
class TensorRule:
    """How one Megatron tensor becomes Hugging Face tensors, and back.

    Attributes:
        megatron: Name in the checkpoint.
        hugging_face: Names, with ``{layer}`` where there is one per layer.
        shapes: Shapes of the Hugging Face tensors.
        group_rows: Rows that each Hugging Face tensor has in one group of the Megatron tensor. None if they follow
            each other whole.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    shapes: Callable[[ModelConfig], tuple[Shape, ...]]
    group_rows: Callable[[ModelConfig], tuple[int, ...]] | None = None

    @property
    def stacked(self) -> bool:
        """Whether the checkpoint holds all layers in one tensor, stacked in dim 0."""
        return self.megatron.startswith("decoder.layers.")

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are tokens; the checkpoint may hold rows of padding after them."""
        return self.shapes is _vocabulary_shape

    def row_ranges(self, model: ModelConfig) -> Iterator[RowRange]:
        """Yield the row ranges of the Megatron tensor (of one layer) in order; a vocabulary's padding is in none."""
        rows = [shape[0] for shape in self.shapes(model)]
        each = rows if self.group_rows is None else self.group_rows(model)
        start = 0
        for group in range(rows[0] // each[0]):
            for part, num_rows in enumerate(each):
                yield RowRange(start, num_rows, part, group * num_rows)
                start += num_rows


@dataclass(frozen=True)
class Piece:
    """One Megatron tensor of one layer, with the Hugging Face tensors it becomes.

    Attributes:
        rule: The mapping.
        layer: Layer, or None for a tensor outside the layers.
        names: Hugging Face names.
        shapes: Their shapes, in the order of ``names``.
    """

    rule: TensorRule
    layer: int | None
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]


def _attention_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    key_value = (model.num_query_groups * model.kv_channels, model.hidden_size)
    return (model.num_attention_heads * model.kv_channels, model.hidden_size), key_value, key_value


def _rows_of_query_group(model: ModelConfig) -> tuple[int, ...]:
    heads = model.num_attention_heads // model.num_query_groups
    return heads * model.kv_channels, model.kv_channels, model.kv_channels


def _norm_shape(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.hidden_size,),)


def _vocabulary_shape(model: ModelConfig) -> tuple[Shape, ...]:
    return ((model.vocab_size, model.hidden_size),)


_EMBEDDING = TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _vocabulary_shape)
_FINAL_NORM = TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",), _norm_shape)
_LM_HEAD = TensorRule("output_layer.weight", ("lm_head.weight",), _vocabulary_shape)
_LAYER = (
    TensorRule(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        _norm_shape,
    ),
    TensorRule(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
        _attention_shapes,
        _rows_of_query_group,
    ),
    TensorRule(
        "decoder.layers.self_attention.linear_proj.weight",
        ("model.layers.{layer}.self_attn.o_proj.weight",),
        lambda model: ((model.hidden_size, model.num_attention_heads * model.kv_channels),),
    ),
    TensorRule(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        _norm_shape,
    ),
    TensorRule(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        lambda model: ((model.ffn_hidden_size, model.hidden_size),) * 2,
    ),
    TensorRule(
        "decoder.layers.mlp.linear_fc2.weight",
        ("model.layers.{layer}.mlp.down_proj.weight",),
        lambda model: ((model.hidden_size, model.ffn_hidden_size),),
    ),
)


def rules(model: ModelConfig) -> tuple[TensorRule, ...]:
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


def _piece(rule: TensorRule, layer: int | None, model: ModelConfig) -> Piece:
    return Piece(rule, layer, tuple(name.format(layer=layer) for name in rule.hugging_face), rule.shapes(model))
