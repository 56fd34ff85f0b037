"""The mapping of tensors: every row once, with transformers' own model as the judge of names and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.weights.names import TensorRule, pieces, rules
from tests.support.export_tools import make_model, models
from tests.support.tiny import tiny_config


def rule_of(ending: str, model: ModelConfig) -> TensorRule:
    """Return the rule of the Megatron tensor whose name ends so."""
    (rule,) = [rule for rule in rules(model) if rule.megatron.endswith(ending)]
    return rule


@given(models())
@settings(max_examples=100, deadline=None)
def test_row_ranges_cover_every_row_of_both_forms_once_in_order(model: ModelConfig) -> None:
    for piece in pieces(model):
        ranges = list(piece.rule.row_ranges(model))
        assert [found.start for found in ranges] == [0, *(found.end for found in ranges[:-1])]
        for part, shape in enumerate(piece.shapes):
            theirs = [found for found in ranges if found.part == part]
            rows = [row for found in theirs for row in range(found.part_start, found.part_start + found.num_rows)]
            assert rows == list(range(shape[0])), (piece.names[part], rows)


def test_queries_keys_and_values_come_group_by_group() -> None:
    model = make_model(num_attention_heads=4, num_query_groups=2, kv_channels=1)
    # A group's two queries, its key, its value.
    assert list(rule_of("linear_qkv.weight", model).row_ranges(model)) == [
        (0, 2, 0, 0), (2, 1, 1, 0), (3, 1, 2, 0), (4, 2, 0, 2), (6, 1, 1, 1), (7, 1, 2, 1),
    ]  # fmt: skip


def test_the_gate_comes_before_up() -> None:
    model = make_model(ffn_hidden_size=5)
    rule = rule_of("linear_fc1.weight", model)
    assert list(rule.row_ranges(model)) == [(0, 5, 0, 0), (5, 5, 1, 0)]
    assert [name.split(".")[-2] for name in rule.hugging_face] == ["gate_proj", "up_proj"]


def test_the_padding_of_the_vocabulary_is_in_no_row_range() -> None:
    model = make_model(vocab_size=100)
    assert list(rule_of("word_embeddings.weight", model).row_ranges(model)) == [(0, 100, 0, 0)]


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers_llama(tied: bool) -> None:
    model = make_model(share_embeddings_and_output_weights=tied)
    config = LlamaConfig(
        vocab_size=100, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    ours = {name: shape for piece in pieces(model) for name, shape in zip(piece.names, piece.shapes, strict=True)}
    assert ours == expected


def test_the_expected_tensors_are_those_of_the_pieces() -> None:
    for tied in (False, True):
        model = make_model(share_embeddings_and_output_weights=tied)
        assert {rule.megatron for rule in rules(model)} == {piece.rule.megatron for piece in pieces(model)}


def test_the_names_are_those_of_megatrons_checkpoints() -> None:
    model = tiny_config(Path("data"), Path("runs")).model
    table = {rule.megatron: (rule.stacked, rule.hugging_face) for rule in rules(model)}
    layer = "model.layers.{layer}"
    assert table == {
        "embedding.word_embeddings.weight": (False, ("model.embed_tokens.weight",)),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (True, (f"{layer}.input_layernorm.weight",)),
        "decoder.layers.self_attention.linear_qkv.weight": (
            True,
            tuple(f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"),
        ),
        "decoder.layers.self_attention.linear_proj.weight": (True, (f"{layer}.self_attn.o_proj.weight",)),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (True, (f"{layer}.post_attention_layernorm.weight",)),
        "decoder.layers.mlp.linear_fc1.weight": (
            True,
            (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
        ),
        "decoder.layers.mlp.linear_fc2.weight": (True, (f"{layer}.mlp.down_proj.weight",)),
        "decoder.final_layernorm.weight": (False, ("model.norm.weight",)),
        "output_layer.weight": (False, ("lm_head.weight",)),
    }
