"""Parameters and FLOPs, against published numbers and against each other."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.plan.flops import training_flops, training_flops_per_token
from nemo_prolong.plan.model_size import model_size


def model(name: str) -> ModelConfig:
    values = yaml.safe_load((CONFIG_DIR / "model" / f"{name}.yaml").read_text())
    return ModelConfig.model_validate(values)


LLAMA = model("llama3_8b_instruct")
MINI = model("mini")


def test_llama_3_8b_has_the_parameters_of_its_checkpoint():
    size = model_size(LLAMA)
    assert size.total == 8_030_261_248
    assert (size.embedding, size.head) == (525_336_576, 525_336_576)
    assert size.norms == 65 * 4096


def test_a_tied_head_is_counted_once_and_still_multiplied_with():
    tied = MINI.model_copy(update={"share_embeddings_and_output_weights": True})
    assert model_size(MINI).total - model_size(tied).total == 2048 * 192
    assert model_size(tied).in_matrix_products == model_size(MINI).in_matrix_products


@pytest.mark.parametrize("name", ["mini", "llama3_8b_instruct"])
def test_the_count_equals_that_of_the_transformers_model(name):
    import torch
    import transformers

    ours = model(name)
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.ffn_hidden_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_query_groups,
        head_dim=ours.kv_channels,
        tie_word_embeddings=ours.share_embeddings_and_output_weights,
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    assert model_size(ours).total == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("length", "gigaflops"), [(8192, 51.5), (65_536, 96.6), (131_072, 148.1), (262_144, 251.2), (524_288, 457.3)]
)
def test_flops_per_token_of_llama_3_8b_are_nvidia_s(length, gigaflops):
    assert training_flops_per_token(LLAMA, length) / 1e9 == pytest.approx(gigaflops, abs=0.05)


def test_nvidia_s_744_teraflops_follow_from_its_tokens():
    assert 14_451 * training_flops_per_token(LLAMA, 8192) / 1e12 == pytest.approx(744, abs=0.5)


def formula(config: ModelConfig, length: int) -> float:
    """NVIDIA's ``llama3()`` per token, for heads that fill the hidden size."""
    h, ffn, layers = config.hidden_size, config.ffn_hidden_size, config.num_layers
    groups = config.num_query_groups / config.num_attention_heads
    vocabulary = 6 * config.vocab_size / (layers * h)
    return layers * h**2 * (12 + 12 * groups + 18 * ffn / h + 6 * length / h + vocabulary)


@given(length=st.integers(1, 600_000), layers=st.integers(1, 100), ffn=st.integers(1, 30_000))
def test_flops_agree_with_the_formula_everywhere(length, layers, ffn):
    config = LLAMA.model_copy(update={"num_layers": layers, "ffn_hidden_size": ffn})
    assert training_flops_per_token(config, length) == pytest.approx(formula(config, length), rel=1e-12)


@given(lengths=st.lists(st.integers(1, 10_000), max_size=20))
def test_a_batch_costs_the_sum_of_its_documents(lengths):
    assert training_flops(MINI, lengths) == sum(training_flops(MINI, [length]) for length in lengths)


def test_cutting_a_document_saves_attention_and_nothing_else():
    whole, halves = training_flops(MINI, [8192]), training_flops(MINI, [4096, 4096])
    width = MINI.num_attention_heads * MINI.kv_channels
    assert whole - halves == 6 * MINI.num_layers * width * (8192**2 - 2 * 4096**2)
