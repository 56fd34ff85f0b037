"""What a Hugging Face directory must be before a stage starts from it; every refusal names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from nemo_prolong.config.schema import ModelConfig, RopeScaling
from nemo_prolong.errors import CheckpointError, ConfigError
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.hf_reader import HuggingFaceReader
from nemo_prolong.weights.names import pieces
from tests.support.export_tools import make_model

MODEL = make_model(num_layers=2)
INDEX = "model.safetensors.index.json"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(model: ModelConfig = MODEL, **changes: Any) -> dict[str, Any]:
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }
    return {**fields, **changes}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory of two shards."""
    shapes = [(name, shape) for p in pieces(MODEL) for name, shape in zip(p.names, p.shapes, strict=True)]
    files = {"a.safetensors": dict(shapes[:6]), "b.safetensors": dict(shapes[6:])}
    for file, tensors in files.items():
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config()))
    return tmp_path


def check(directory: Path, model: ModelConfig = MODEL) -> HuggingFaceDirectory:
    found = HuggingFaceDirectory(directory)
    found.check_fields(model)
    found.check_tensors(model)
    return found


def refusal(kind: type[Exception], directory: Path, model: ModelConfig = MODEL) -> str:
    with pytest.raises(kind) as error:
        check(directory, model)
    assert type(error.value) is kind
    message = str(error.value)
    assert message.startswith(f"parent=hf:{directory}: ")
    return message


def test_a_whole_directory_is_accepted(llama: Path) -> None:
    found = check(llama)
    assert (found.rotary_base, found.rope_scaling, found.context_length) == (500000.0, None, 8192)


def test_one_file_without_index_or_in_half_precision_is_accepted(llama: Path) -> None:
    tensors = load_file(llama / "a.safetensors") | load_file(llama / "b.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, llama / "model.safetensors")
    for name in (INDEX, "a.safetensors", "b.safetensors"):
        (llama / name).unlink()
    check(llama)


def test_two_sets_of_weights_in_one_directory_are_refused(llama: Path) -> None:
    tensors = load_file(llama / "a.safetensors") | load_file(llama / "b.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, llama / "model.safetensors")
    message = refusal(CheckpointError, llama)
    assert f"it holds two sets of weights, model.safetensors and the files of {INDEX}" in message
    assert "Remove model.safetensors, or the index and its files." in message
    (llama / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    check(llama)


def test_a_tensor_in_a_file_that_the_index_does_not_name_is_refused(llama: Path) -> None:
    """Such files are left by tools that reuse shards. transformers and vLLM read the other tensor."""
    first, second = load_file(llama / "a.safetensors"), load_file(llama / "b.safetensors")
    name = sorted(first)[0]
    save_file({**second, name: first[name] + 1}, llama / "b.safetensors")
    assert f"b.safetensors holds {name}, which {INDEX} says is in a.safetensors." in refusal(CheckpointError, llama)
    save_file({**second, "of.nobody": first[name]}, llama / "b.safetensors")
    check(llama)


def test_pickles_beside_safetensors_are_left_alone(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"not even a pickle")
    check(llama)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "it holds an adapter of PEFT (adapter_config.json)"),
        ("config.json", config(transformers_weights="c.safetensors"), 'transformers_weights="c.safetensors"'),
    ],
)
def test_weights_that_only_transformers_would_find_are_refused(
    llama: Path, file: str, content: dict[str, Any], said: str
) -> None:
    (llama / file).write_text(json.dumps(content))
    assert said in refusal(CheckpointError, llama)


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"auto_map": {"AutoModel": "x.Y"}}, "config.json asks for code of its own (auto_map)"),
    ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "it is a mistral (MistralForCausalLM), not a"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "it is a llama (LlamaForSequenceClassification), not a"),
    ({"attention_bias": True}, "attention_bias=true (false is what can be trained)"),
    ({"mlp_bias": True}, "mlp_bias=true (false is what can be trained)"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu" ("silu" is what can be trained)'),
    (
        {"quantization_config": {"bits": 4}},
        "its weights are quantized (quantization_config of config.json). Start from",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "its weights are quantized (quantization_config of config.json: fp8). Start from the weights in BF16",
    ),
    (
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "quantized (compression_config of config.json: comp",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (1.0 is what can be trained)"),
    (
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        "only a part of each head is rotated (part",
    ),
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "it is a qwen2 (Qwen2ForCausalLM), not a llama"),
    ({"sliding_window": 4096}, "sliding_window=4096 (false is what can be trained)"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 (null is what can be trained)"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 (1.0 is what can be trained)"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "some of its layers are sliding_attention"),
    ({"num_hidden_layers": "2"}, 'num_hidden_layers="2" is no positive whole number'),
    ({"num_attention_heads": 0}, "num_attention_heads=0 is no positive whole number"),
    ({"hidden_size": None}, "config.json has no hidden_size"),
    ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps="1e-5" is no positive number'),
    ({"rope_theta": "5e5"}, 'rope_theta="5e5" is no positive number'),
    ({"tie_word_embeddings": "false"}, 'tie_word_embeddings="false" is neither true nor false'),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "its RoPE scaling is linear, and Megatron computes none but"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "its RoPE scaling is yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "its RoPE scaling cannot be read"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta (500000) and rope_parameters.rope_theta (10000) name different RoPE bases",
    ),
    (
        {"rope_scaling": {**LLAMA3, "rope_theta": 1e4}},
        "rope_theta (500000) and rope_scaling.rope_theta (10000) name dif",
    ),
    (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
        "rope_parameters.rope_theta (10000) and rope_scaling.rope_theta (500000) name different RoPE bases",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}},
        "its rope_parameters differ between layers (full_attention, sliding_attention)",
    ),
    ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_type (llama3) and type (linear) of its RoPE scaling differ"),
    ({"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "its RoPE scaling has beta_fast, which llama3 has not"),
    ({"rope_scaling": "llama3"}, "its rope_scaling is no JSON object"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "rope_parameters (None) and rope_scaling"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGURATIONS, ids=[" ".join(c) for c, _ in CONFIGURATIONS])
def test_what_megatron_would_compute_otherwise_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    assert message in refusal(CheckpointError, llama)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 4}, "model.num_layers (4 there, 2 here)"),
    ({"vocab_size": 128}, "model.vocab_size (128 there, 100 here)"),
    ({"num_key_value_heads": None}, "model.num_query_groups (6 there, 2 here)"),
    ({"head_dim": None}, "model.kv_channels (4 there, 8 here)"),
    ({"rms_norm_eps": 1e-6}, "model.layernorm_epsilon (1e-06 there, 1e-05 here)"),
    ({"tie_word_embeddings": True}, "model.share_embeddings_and_output_weights (True there, False here)"),
    ({"rope_scaling": LLAMA3}, "model.rope_scaling (factor=8.0 "),
]


@pytest.mark.parametrize(("changes", "message"), FIELDS, ids=[" ".join(c) for c, _ in FIELDS])
def test_another_model_than_configured_is_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    assert message in refusal(ConfigError, llama)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": None},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": None},
        {"rope_parameters": {"full_attention": {**LLAMA3, "rope_theta": 500000.0}}, "rope_theta": None},
        {"rope_scaling": {**{key: value for key, value in LLAMA3.items() if key != "rope_type"}, "type": "llama3"}},
    ],
    ids=["transformers 4", "transformers 5", "both", "base in the scaling", "by kind of layer", "the older key"],
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
    {"layer_types": ["full_attention"] * 2, "attention_dropout": 0.1, "torch_dtype": "float16"},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=[" ".join(changes) for changes in NEUTRAL])
def test_what_changes_no_computation_is_accepted(llama: Path, changes: dict[str, Any]) -> None:
    (llama / "config.json").write_text(json.dumps(config(**changes)))
    found = check(llama)
    assert (found.rotary_base, found.rope_scaling) == (500000.0, None)


def test_absent_keys_have_the_defaults_of_transformers(llama: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta")
    (llama / "config.json").write_text(json.dumps(config(**dict.fromkeys(absent))))
    found = HuggingFaceDirectory(llama)
    expected = LlamaConfig(hidden_size=MODEL.hidden_size, num_attention_heads=MODEL.num_attention_heads)
    fields = found.model_fields()
    assert (fields["num_query_groups"], fields["kv_channels"]) == (expected.num_key_value_heads, expected.head_dim)
    assert (fields["layernorm_epsilon"], found.rotary_base) == (expected.rms_norm_eps, expected.rope_theta)
    assert fields["share_embeddings_and_output_weights"] is expected.tie_word_embeddings


def test_a_larger_vocabulary_than_the_directorys_is_accepted(llama: Path) -> None:
    found = check(llama, MODEL.model_copy(update={"vocab_size": 103}))
    assert found.vocab_size == 100


@pytest.mark.parametrize(
    ("wrap", "wrappers"),
    [
        (lambda name: f"_orig_mod.{name}", ("_orig_mod",)),
        (lambda name: f"module.module._orig_mod.{name}", ("module", "_orig_mod")),
        (lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."), ("_fsdp_wrapped_module",)),
        (lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."), ("_checkpoint_wrapped_module",)),
    ],
    ids=["torch.compile", "DDP and torch.compile", "FSDP", "activation checkpointing"],
)
def test_names_are_read_without_wrappers(llama: Path, wrap: Callable[[str], str], wrappers: tuple[str, ...]) -> None:
    tensors = load_file(llama / "a.safetensors") | load_file(llama / "b.safetensors")
    tensors["model.norm.weight"] += 3
    save_file({wrap(name): tensor for name, tensor in tensors.items()}, llama / "model.safetensors")
    (llama / INDEX).unlink()
    found = check(llama)
    assert sorted(found.wrappers) == sorted(wrappers)
    rows = torch.empty(MODEL.hidden_size)
    HuggingFaceReader(found, MODEL).fill(rows, "decoder.final_layernorm.weight")
    assert torch.equal(rows, tensors["model.norm.weight"])


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a file, or take them out."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def set_in_index(directory: Path, name: str, file: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {key: value for key, value in {**index["weight_map"], name: file}.items() if value}
    (directory / INDEX).write_text(json.dumps(index))


def only_pickles(directory: Path) -> None:
    for name in (INDEX, "a.safetensors", "b.safetensors"):
        (directory / name).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80")


def truncate(directory: Path) -> None:
    (directory / "b.safetensors").write_bytes((directory / "b.safetensors").read_bytes()[:-1])


def bias(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(directory / "a.safetensors", **{name: torch.zeros(48)})
    set_in_index(directory, name, "a.safetensors")


def both_kinds(directory: Path) -> None:
    save_file(load_file(directory / "a.safetensors"), directory / "model.safetensors")


def adapter_inside(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    rewrite(directory / "a.safetensors", **{name: torch.zeros(4, 24)})
    set_in_index(directory, name, "a.safetensors")


def beside_the_weights(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    def add(directory: Path) -> None:
        rewrite(directory / "a.safetensors", **{name: tensor})
        set_in_index(directory, name, "a.safetensors")

    return add


def wrapped_twin(directory: Path) -> None:
    name = "_orig_mod.lm_head.weight"
    rewrite(directory / "a.safetensors", **{name: torch.zeros(100, 24)})
    set_in_index(directory, name, "a.safetensors")


HEAD = "lm_head.weight"
FILES: list[tuple[Callable[[Path], object], str]] = [
    (only_pickles, "its weights are pickles (pytorch_model.bin), which can run code when they are opened"),
    (truncate, "b.safetensors is not whole ("),
    (lambda d: (d / "b.safetensors").unlink(), "b.safetensors is missing."),
    (lambda d: (d / "config.json").unlink(), "config.json cannot be read ("),
    (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read ("),
    (lambda d: (d / INDEX).write_text("{}"), f"{INDEX} has no weight_map of files beside it."),
    (lambda d: set_in_index(d, "lm_head.weight", "../b.safetensors"), f"{INDEX} has no weight_map of files beside it."),
    (lambda d: set_in_index(d, "lm_head.weight", "a.safetensors"), "lm_head.weight is not in a.safetensors."),
    (lambda d: set_in_index(d, "lm_head.weight", None), "lm_head.weight is missing."),
    (bias, "model.layers.0.self_attn.q_proj.bias is not part of a Llama."),
    (
        lambda d: rewrite(d / "b.safetensors", **{"lm_head.weight": torch.zeros(128, 24)}),
        "lm_head.weight has shape [128, 24], not [100, 24].",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.int8)}),
        "its weights are quantized (lm_head.weight is I8). Start from the weights in BF16, F16 or F32 that these were",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.float8_e4m3fn)}),
        "its weights are quantized (lm_head.weight is F8_E4M3). Start from the weights in BF16, F16 or F32",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.float64)}),
        "lm_head.weight is F64, not one of BF16, F16, F32. Convert the weights to one of these.",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        "its weights are quantized (model.layers.0.mlp.up_proj.weight_scale_inv beside the weights).",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.qweight", torch.ones(1, 1, dtype=torch.int32)),
        "its weights are quantized (model.layers.0.mlp.up_proj.qweight beside the weights; model.layers.0.mlp.up_proj.",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.ones(1)),
        "quantized (model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4 beside the weights).",
    ),
    (lambda d: (d / "hf_quant_config.json").write_text("{}"), "its weights are quantized (hf_quant_config.json)."),
    (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        "it holds an adapter of PEFT (adapter_config.json), not a whole model. Merge it first (merge_and_unload()",
    ),
    (
        adapter_inside,
        "it holds an adapter of PEFT (model.layers.0.self_attn.q_proj.lora_A.default.weight), not a whole",
    ),
    (wrapped_twin, "lm_head.weight and _orig_mod.lm_head.weight are both lm_head.weight. Save the model again without"),
    (both_kinds, f"it holds two sets of weights, model.safetensors and the files of {INDEX}"),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=[message[:30] for _, message in FILES])
def test_files_that_are_not_a_whole_llama_are_refused(
    llama: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(llama)
    assert message in refusal(CheckpointError, llama)


def test_saved_frequencies_and_a_tied_head_are_not_read(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(llama / "a.safetensors", **{name: torch.zeros(4)})
    set_in_index(llama, name, "a.safetensors")
    (llama / "config.json").write_text(json.dumps(config(tie_word_embeddings=True)))
    check(llama, MODEL.model_copy(update={"share_embeddings_and_output_weights": True}))


def test_a_tied_head_of_other_values_than_the_embedding_is_refused(llama: Path) -> None:
    tied = MODEL.model_copy(update={"share_embeddings_and_output_weights": True})
    (llama / "config.json").write_text(json.dumps(config(tie_word_embeddings=True)))
    check(llama, tied)
    rewrite(llama / "b.safetensors", **{HEAD: torch.ones(100, 24)})
    message = "tie_word_embeddings is true, and lm_head.weight has other values than model.embed_tokens.weight."
    assert message in refusal(CheckpointError, llama, tied)


def test_one_changed_byte_changes_the_hash(llama: Path) -> None:
    before = HuggingFaceDirectory(llama).sha256()
    assert before == HuggingFaceDirectory(llama).sha256()
    data = bytearray((llama / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "b.safetensors").write_bytes(data)
    assert HuggingFaceDirectory(llama).sha256() != before


# What ends generation.


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [2, 9]}, [2, 9]),
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
