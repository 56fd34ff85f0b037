"""The mapping of tensors: exact both ways, with transformers' own model as the judge of names and shapes."""

from __future__ import annotations

import pytest
import torch
from export_tools import make_model, models
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.export.names import join_gate_up, join_qkv, pieces, rules, split_gate_up, split_qkv


@given(models(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_every_megatron_tensor_comes_back_bitwise_from_its_hugging_face_parts(
    model: ModelConfig, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces(model):
        rows = sum(shape[0] for shape in piece.shapes)
        tensor = torch.randn((rows, *piece.shapes[0][1:]), generator=generator).to(dtype)
        parts = piece.rule.split(tensor, model)
        assert [part.shape for part in parts] == list(piece.shapes)
        assert torch.equal(piece.rule.join(parts, model), tensor)


def test_queries_keys_and_values_are_taken_from_each_query_group_in_turn() -> None:
    model = make_model(num_attention_heads=4, num_query_groups=2, kv_channels=1, hidden_size=1)
    # Group 0: queries 1 and 2, key 30, value 40; group 1: queries 3 and 4, key 31, value 41.
    fused = torch.tensor([1, 2, 30, 40, 3, 4, 31, 41])[:, None]
    query, key, value = split_qkv(fused, model)
    assert (query.flatten().tolist(), key.flatten().tolist(), value.flatten().tolist()) == (
        [1, 2, 3, 4],
        [30, 31],
        [40, 41],
    )
    assert torch.equal(join_qkv([query, key, value], model), fused)


def test_the_gate_comes_before_up() -> None:
    model = make_model(ffn_hidden_size=2, hidden_size=1)
    fused = torch.tensor([[1], [2], [3], [4]])
    gate, up = split_gate_up(fused, model)
    assert (gate.flatten().tolist(), up.flatten().tolist()) == ([1, 2], [3, 4])
    assert torch.equal(join_gate_up([gate, up], model), fused)


def test_the_padding_of_the_vocabulary_is_dropped_and_nothing_else() -> None:
    model = make_model(vocab_size=100)
    padded = torch.arange(128 * 24).reshape(128, 24)
    embedding = next(pieces(model))
    assert embedding.names == ("model.embed_tokens.weight",)
    (part,) = embedding.rule.split(padded, model)
    assert torch.equal(part, padded[:100])


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


def test_the_tensors_expected_in_a_checkpoint_are_those_of_the_pieces() -> None:
    for tied in (False, True):
        model = make_model(share_embeddings_and_output_weights=tied)
        assert {rule.megatron for rule in rules(model)} == {piece.rule.megatron for piece in pieces(model)}
