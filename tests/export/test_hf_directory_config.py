"""What a directory's ``config.json`` must say before a stage starts from it; every refusal names the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from nemo_prolong.config.schema import RopeScaling
from nemo_prolong.errors import CheckpointError, ConfigError
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from tests.support.hf_llama import (
    CORRECT_IT,
    LLAMA3,
    MODEL,
    NO_SCALING,
    THIS_MODEL,
    UNQUANTIZED,
    WITHOUT_THESE,
    WRONG_BASE,
    check,
    config,
    refusal,
)

CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"auto_map": {"AutoModel": "x.Y"}},
        "config.json asks for code of its own (auto_map), and no code of a model is run here. Use a "
        "directory that plain transformers loads without trust_remote_code.",
    ),
    (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        f"it is a mistral (MistralForCausalLM), not a llama (LlamaForCausalLM). {WITHOUT_THESE}",
    ),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        f"it is a llama (LlamaForSequenceClassification), not a llama (LlamaForCausalLM). {WITHOUT_THESE}",
    ),
    ({"attention_bias": True}, f"attention_bias=true (false is what can be trained). {WITHOUT_THESE}"),
    ({"mlp_bias": True}, f"mlp_bias=true (false is what can be trained). {WITHOUT_THESE}"),
    ({"hidden_act": "gelu"}, f'hidden_act="gelu" ("silu" is what can be trained). {WITHOUT_THESE}'),
    (
        {"quantization_config": {"bits": 4}},
        f"its weights are quantized (quantization_config of config.json). {UNQUANTIZED}",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        f"its weights are quantized (quantization_config of config.json: fp8). {UNQUANTIZED}",
    ),
    (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        f"its weights are quantized (compression_config of config.json: compressed-tensors). {UNQUANTIZED}",
    ),
    ({"partial_rotary_factor": 0.5}, f"partial_rotary_factor=0.5 (1.0 is what can be trained). {WITHOUT_THESE}"),
    (
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        "only a part of each head is rotated (partial_rotary_factor of rope_parameters). Use another model.",
    ),
    (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
        f"it is a qwen2 (Qwen2ForCausalLM), not a llama (LlamaForCausalLM). {WITHOUT_THESE}",
    ),
    ({"final_logit_softcapping": 30.0}, f"final_logit_softcapping=30.0 (null is what can be trained). {WITHOUT_THESE}"),
    (
        {"layer_types": ["full_attention", "sliding_attention"]},
        f"some of its layers are sliding_attention. {WITHOUT_THESE}",
    ),
    ({"num_hidden_layers": "2"}, f'num_hidden_layers="2" is no positive whole number. {CORRECT_IT}'),
    ({"num_attention_heads": 0}, f"num_attention_heads=0 is no positive whole number. {CORRECT_IT}"),
    ({"hidden_size": None}, "config.json has no hidden_size. Download it again."),
    ({"rms_norm_eps": "1e-5"}, f'rms_norm_eps="1e-5" is no positive number. {CORRECT_IT}'),
    ({"rope_theta": "5e5"}, f'rope_theta="5e5" is no positive number. {CORRECT_IT}'),
    ({"tie_word_embeddings": "false"}, f'tie_word_embeddings="false" is neither true nor false. {CORRECT_IT}'),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        f"its RoPE scaling is linear, and Megatron computes none but Llama-3.1's (llama3). {NO_SCALING}",
    ),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        f"its RoPE scaling is yarn, and Megatron computes none but Llama-3.1's (llama3). {NO_SCALING}",
    ),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "its RoPE scaling cannot be read (low_freq_factor: Field required; high_freq_factor: Field required; "
        f"original_max_position_embeddings: Field required). {CORRECT_IT}",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        f"rope_theta (500000) and rope_parameters.rope_theta (10000) name different RoPE bases. {WRONG_BASE}",
    ),
    (
        {"rope_scaling": {**LLAMA3, "rope_theta": 1e4}},
        f"rope_theta (500000) and rope_scaling.rope_theta (10000) name different RoPE bases. {WRONG_BASE}",
    ),
    (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
        "rope_parameters.rope_theta (10000) and rope_scaling.rope_theta (500000) name different RoPE bases. "
        f"{WRONG_BASE}",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
        "its rope_parameters differ between layers (full_attention, sliding_attention). Start from a model "
        "with one RoPE.",
    ),
    (
        {"rope_scaling": {**LLAMA3, "type": "linear"}},
        f"rope_type (llama3) and type (linear) of its RoPE scaling differ. {CORRECT_IT}",
    ),
    (
        {"rope_scaling": {**LLAMA3, "beta_fast": 32}},
        "its RoPE scaling has beta_fast, which llama3 has not. Correct it.",
    ),
    (
        {"rope_scaling": {**LLAMA3, "extra": {}}},
        "its RoPE scaling has extra, which llama3 has not. Correct it.",
    ),
    ({"rms_norm_eps": 0.0}, f"rms_norm_eps=0.0 is no positive number. {CORRECT_IT}"),
    ({"rms_norm_eps": True}, f"rms_norm_eps=true is no positive number. {CORRECT_IT}"),
    ({"max_position_embeddings": True}, f"max_position_embeddings=true is no positive whole number. {CORRECT_IT}"),
    ({"rope_scaling": "llama3"}, f"its rope_scaling is no JSON object. {CORRECT_IT}"),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3},
        "rope_parameters (None) and rope_scaling (factor=8.0 low_freq_factor=1.0 high_freq_factor=4.0 "
        f"original_max_position_embeddings=8192) differ. {CORRECT_IT}",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGURATIONS, ids=[" ".join(c) for c, _ in CONFIGURATIONS])
def test_what_megatron_would_compute_otherwise_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    assert refusal(CheckpointError, llama) == f"parent=hf:{llama}: {message}"


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 4}, f"model.num_layers (4 there, 2 here). {THIS_MODEL}"),
    ({"vocab_size": 128}, f"model.vocab_size (128 there, 100 here). {THIS_MODEL}"),
    ({"num_key_value_heads": None}, f"model.num_query_groups (6 there, 2 here). {THIS_MODEL}"),
    ({"head_dim": None}, f"model.kv_channels (4 there, 8 here). {THIS_MODEL}"),
    ({"rms_norm_eps": 1e-6}, f"model.layernorm_epsilon (1e-06 there, 1e-05 here). {THIS_MODEL}"),
    (
        {"tie_word_embeddings": True},
        f"model.share_embeddings_and_output_weights (True there, False here). {THIS_MODEL}",
    ),
    (
        {"rope_scaling": LLAMA3},
        "model.rope_scaling (factor=8.0 low_freq_factor=1.0 high_freq_factor=4.0 "
        f"original_max_position_embeddings=8192 there, None here). {THIS_MODEL}",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FIELDS, ids=[" ".join(c) for c, _ in FIELDS])
def test_another_model_than_configured_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    assert refusal(ConfigError, llama) == f"parent=hf:{llama}: its model differs from the one configured in {message}"


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": None},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": None},
        {"rope_parameters": {"full_attention": {**LLAMA3, "rope_theta": 500000.0}}, "rope_theta": None},
        {"rope_scaling": {**{key: value for key, value in LLAMA3.items() if key != "rope_type"}, "type": "llama3"}},
        {"rope_scaling": {**LLAMA3, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_theta": 500000.0, "partial_rotary_factor": 1.0}, "rope_scaling": LLAMA3},
    ],
    ids=[
        "transformers 4",
        "transformers 5",
        "both",
        "base in the scaling",
        "by kind of layer",
        "the older key",
        "all of a head",
        "base and scaling apart",
    ],
)
def test_the_scaling_of_llama_3_1_is_read_from_both_versions(llama: Path, keys: dict[str, Any]) -> None:
    (llama / "config.json").write_text(json.dumps(config(**keys)))
    scaling = RopeScaling(**{key: value for key, value in LLAMA3.items() if key != "rope_type"})
    found = check(llama, MODEL.model_copy(update={"rope_scaling": scaling}))
    assert (found.rotary_base, found.rope_scaling) == (500000.0, scaling)


NEUTRAL: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 1.0}},
    {"hidden_act": "swish", "attention_bias": False, "mlp_bias": None, "sliding_window": None, "pretraining_tp": 2},
    {"architectures": None},
    {"layer_types": ["full_attention"] * 2, "attention_dropout": 0.1, "torch_dtype": "float16"},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=[" ".join(changes) for changes in NEUTRAL])
def test_what_changes_no_computation_is_accepted(llama: Path, changes: dict[str, Any]) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    found = check(llama)
    assert (found.rotary_base, found.rope_scaling) == (500000.0, None)


# Keys of other kinds of models: what changes nothing, and what does.
OTHER_KINDS: dict[str, tuple[list[Any], Any]] = {
    "attn_logit_softcapping": ([None], 30.0),
    "final_logit_softcapping": ([None], 30.0),
    "embedding_multiplier": ([1.0], 2.0),
    "residual_multiplier": ([1.0], 2.0),
    "attention_multiplier": ([None], 1.0),
    "logits_scaling": ([1.0], 2.0),
    "logit_scale": ([1.0], 2.0),
    "num_experts": ([0, 1], 2),
    "num_local_experts": ([0, 1], 2),
    "use_qk_norm": ([False], True),
    "qk_norm": ([False], True),
    "use_parallel_residual": ([False], True),
    "no_rope_layers": ([[]], [1]),
    "sliding_window": ([False, None], 4096),
}


@pytest.mark.parametrize("key", OTHER_KINDS)
def test_a_key_of_another_kind_of_model_must_change_nothing(llama: Path, key: str) -> None:
    neutral, other = OTHER_KINDS[key]
    for value in neutral:
        (llama / "config.json").write_text(json.dumps(config(**{key: value})))
        check(llama)
    (llama / "config.json").write_text(json.dumps(config(**{key: other})))
    named = json.dumps(neutral[0])
    assert f"{key}={json.dumps(other)} ({named} is what can be trained)." in refusal(CheckpointError, llama)


def test_a_context_of_one_token_is_a_context(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps(config(max_position_embeddings=1)))
    assert check(llama).context_length == 1


def test_absent_keys_have_the_defaults_of_transformers(llama: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")
    (llama / "config.json").write_text(json.dumps(config(**dict.fromkeys(absent))))
    found = HuggingFaceDirectory(llama)
    expected = LlamaConfig(hidden_size=MODEL.hidden_size, num_attention_heads=MODEL.num_attention_heads)
    fields = found.model_fields()
    assert (fields["num_query_groups"], fields["kv_channels"]) == (expected.num_key_value_heads, expected.head_dim)
    assert (fields["layernorm_epsilon"], found.rotary_base) == (expected.rms_norm_eps, expected.rope_theta)
    assert fields["share_embeddings_and_output_weights"] is expected.tie_word_embeddings


def test_all_that_differs_from_the_model_configured_is_named(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps(config(num_hidden_layers=4, head_dim=4)))
    assert refusal(ConfigError, llama) == (
        f"parent=hf:{llama}: its model differs from the one configured in model.num_layers (4 there, 2 here), "
        f"model.kv_channels (4 there, 8 here). {THIS_MODEL}"
    )


def test_all_that_is_no_llamas_is_named(llama: Path) -> None:
    changes = {"mlp_bias": True, "hidden_act": "gelu", "layer_types": ["b", "full_attention", "a"]}
    (llama / "config.json").write_text(json.dumps(config(**changes, architectures=["A", "B"])))
    assert refusal(CheckpointError, llama) == (
        f"parent=hf:{llama}: it is a llama (A, B), not a llama (LlamaForCausalLM); mlp_bias=true (false is what can be "
        f'trained); hidden_act="gelu" ("silu" is what can be trained); some of its layers are a, b. {WITHOUT_THESE}'
    )
    scaling = {**LLAMA3, "beta_slow": 1, "beta_fast": 32}
    (llama / "config.json").write_text(json.dumps(config(rope_scaling=scaling)))
    assert "its RoPE scaling has beta_fast, beta_slow, which llama3 has not." in refusal(CheckpointError, llama)


def test_a_larger_vocabulary_than_the_directorys_is_accepted(llama: Path) -> None:
    found = check(llama, MODEL.model_copy(update={"vocab_size": 103}))
    assert found.vocab_size == 100


# What ends generation.


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [2, 9]}, [2, 9]),
        ({"eos_token_id": [0, 99]}, [0, 99]),
        ({"eos_token_id": 9}, [9]),
        ({"eos_token_id": None}, [3]),
        ({"temperature": 0.6}, [3]),
        (None, [3]),
    ],
)
def test_what_ends_generation_is_the_generation_configurations(
    llama: Path, generation: dict[str, Any] | None, expected: list[int]
) -> None:
    (llama / "config.json").write_text(json.dumps(config(eos_token_id=3)))
    if generation is not None:
        (llama / "generation_config.json").write_text(json.dumps(generation))
    assert HuggingFaceDirectory(llama).stop_token_ids == expected


def test_a_directory_may_say_nothing_of_what_ends_generation(llama: Path) -> None:
    assert HuggingFaceDirectory(llama).stop_token_ids == []


@pytest.mark.parametrize("value", ['"</s>"', "[2, 100]", "-1", "true", "[[1]]", "1.5"])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_of_generation_that_is_no_token_is_refused(llama: Path, file: str, value: str) -> None:
    content = config() if file == "config.json" else {}
    (llama / file).write_text(json.dumps({**content, "eos_token_id": json.loads(value)}))
    with pytest.raises(CheckpointError) as refused:
        _ = HuggingFaceDirectory(llama).stop_token_ids
    assert str(refused.value) == (
        f"parent=hf:{llama}: {file} has eos_token_id={value}, and token ids of the model are 0 to 99. "
        f"Correct eos_token_id in {file}: it is what ends the texts that the model generates."
    )
