"""What a Hugging Face directory must be before a stage starts from it; every refusal names what is wrong."""

from __future__ import annotations

import hashlib
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
from nemo_prolong.weights import hf_directory
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
    assert refusal(CheckpointError, llama) == (
        f"parent=hf:{llama}: b.safetensors holds {name}, which {INDEX} says is in a.safetensors. Programs differ in "
        "which of the two they read. Load the model with the program that you trust, and save it again into an empty "
        "directory."
    )
    save_file({**second, "of.nobody": first[name]}, llama / "b.safetensors")
    check(llama)


def test_pickles_beside_safetensors_are_left_alone(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"not even a pickle")
    check(llama)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", {"peft_type": "LORA"}, "it holds an adapter of PEFT (adapter_config.json)"),
        (
            "config.json",
            config(transformers_weights="c.safetensors"),
            'config.json names a weight file of its own, transformers_weights="c.safetensors". Save the model again, '
            f"so that its weights are model.safetensors or the files of {INDEX}.",
        ),
    ],
)
def test_weights_that_only_transformers_would_find_are_refused(
    llama: Path, file: str, content: dict[str, Any], said: str
) -> None:
    (llama / file).write_text(json.dumps(content))
    assert said in refusal(CheckpointError, llama)


def test_a_weight_file_by_its_usual_name_may_be_named(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps(config(transformers_weights=INDEX)))
    check(llama)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(CheckpointError, tmp_path / "none") == (
        f"parent=hf:{tmp_path / 'none'}: the directory does not exist. Download the model, or correct the path."
    )


def test_a_directory_without_weights_is_refused(llama: Path) -> None:
    for name in (INDEX, "a.safetensors", "b.safetensors"):
        (llama / name).unlink()
    assert refusal(CheckpointError, llama) == (
        f"parent=hf:{llama}: it has no {INDEX} and no model.safetensors. Download all of the model."
    )


def test_some_of_many_problems_are_named(llama: Path) -> None:
    for name in (INDEX, "a.safetensors", "b.safetensors"):
        (llama / name).unlink()
    for number in range(4):
        (llama / f"{number}.bin").write_bytes(b"")
    assert "its weights are pickles (0.bin, 1.bin, 2.bin), which" in refusal(CheckpointError, llama)
    shapes = {name: shape for piece in pieces(MODEL) for name, shape in zip(piece.names, piece.shapes, strict=True)}
    save_file({name: torch.zeros(shape) for name, shape in list(shapes.items())[5:]}, llama / "model.safetensors")
    named = "; ".join(f"{name} is missing" for name in list(shapes)[:5])
    assert refusal(CheckpointError, llama) == f"parent=hf:{llama}: {named}. {OR_CORRECT_IT}"
    save_file({"lm_head.weight": torch.zeros(100, 24)}, llama / "model.safetensors")
    missing = [name for piece in pieces(MODEL) for name in piece.names if name != "lm_head.weight"]
    named = "; ".join(f"{name} is missing" for name in missing[:5])
    assert refusal(CheckpointError, llama) == (
        f"parent=hf:{llama}: {named} and {len(missing) - 5} more. {OR_CORRECT_IT}"
    )


# Remedies.
WITHOUT_THESE = "Start from a Llama without these."
UNQUANTIZED = "Start from the weights in BF16, F16 or F32 that these were made of, or dequantize them first."
WRONG_BASE = "Correct config.json: with the wrong base the model fails on every long text."
CORRECT_IT = "Correct config.json."
MERGE = "Merge it first (merge_and_unload() and save_pretrained(DIR) of PeftModel), and name that directory."
THIS_MODEL = "Use the model of the directory: set model=..., or these fields."
NO_SCALING = "Start from a model without RoPE scaling or with llama3."
OR_CORRECT_IT = "Download the model again, or correct config.json."

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
    ({"sliding_window": 4096}, f"sliding_window=4096 (false is what can be trained). {WITHOUT_THESE}"),
    ({"final_logit_softcapping": 30.0}, f"final_logit_softcapping=30.0 (null is what can be trained). {WITHOUT_THESE}"),
    ({"embedding_multiplier": 12.0}, f"embedding_multiplier=12.0 (1.0 is what can be trained). {WITHOUT_THESE}"),
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
    (lambda d: (d / "config.json").write_text("[]"), "config.json is no JSON object. Download it again."),
    (
        only_pickles,
        "its weights are pickles (pytorch_model.bin), which can run code when they are opened. Convert them "
        "to safetensors where you trust them: save_pretrained of transformers does.",
    ),
    (
        truncate,
        "b.safetensors is not whole (Error while deserializing header: incomplete metadata, file not fully "
        "covered). Download it again.",
    ),
    (lambda d: (d / "b.safetensors").unlink(), "b.safetensors is missing. Download it again."),
    (
        lambda d: (d / "config.json").unlink(),
        "config.json cannot be read ([Errno 2] No such file or directory: 'DIR/config.json'). Name the "
        "directory of a model.",
    ),
    (
        lambda d: (d / "config.json").write_text("{"),
        "config.json cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)). Name the directory of a model.",
    ),
    (
        lambda d: (d / INDEX).write_text("{}"),
        "model.safetensors.index.json has no weight_map of files beside it. Download it again.",
    ),
    (
        lambda d: set_in_index(d, "lm_head.weight", "../b.safetensors"),
        "model.safetensors.index.json has no weight_map of files beside it. Download it again.",
    ),
    (
        lambda d: set_in_index(d, "lm_head.weight", "a.safetensors"),
        "lm_head.weight is not in a.safetensors. Download the model again.",
    ),
    (
        lambda d: set_in_index(d, "lm_head.weight", None),
        "lm_head.weight is missing. Download the model again. If its LM head is tied, set tie_word_embeddings to true.",
    ),
    (bias, f"model.layers.0.self_attn.q_proj.bias is not part of a Llama. {OR_CORRECT_IT}"),
    (
        lambda d: rewrite(d / "b.safetensors", **{"lm_head.weight": torch.zeros(128, 24)}),
        f"lm_head.weight has shape [128, 24], not [100, 24]. {OR_CORRECT_IT}",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.int8)}),
        f"its weights are quantized (lm_head.weight is I8). {UNQUANTIZED}",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.float8_e4m3fn)}),
        f"its weights are quantized (lm_head.weight is F8_E4M3). {UNQUANTIZED}",
    ),
    (
        lambda d: rewrite(d / "b.safetensors", **{HEAD: torch.zeros(100, 24, dtype=torch.float64)}),
        "lm_head.weight is F64, not one of BF16, F16, F32. Convert the weights to one of these.",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(1, 1)),
        f"its weights are quantized (model.layers.0.mlp.up_proj.weight_scale_inv beside the weights). {UNQUANTIZED}",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.qweight", torch.ones(1, 1, dtype=torch.int32)),
        "its weights are quantized (model.layers.0.mlp.up_proj.qweight beside the weights; "
        f"model.layers.0.mlp.up_proj.qweight is I32). {UNQUANTIZED}",
    ),
    (
        beside_the_weights("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.ones(1)),
        "its weights are quantized (model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4 beside "
        f"the weights). {UNQUANTIZED}",
    ),
    (
        lambda d: (d / "hf_quant_config.json").write_text("{}"),
        f"its weights are quantized (hf_quant_config.json). {UNQUANTIZED}",
    ),
    (
        lambda d: (d / "adapter_config.json").write_text("{}"),
        f"it holds an adapter of PEFT (adapter_config.json), not a whole model. {MERGE}",
    ),
    (
        adapter_inside,
        "it holds an adapter of PEFT (model.layers.0.self_attn.q_proj.lora_A.default.weight), not a whole "
        f"model. {MERGE}",
    ),
    (
        wrapped_twin,
        "lm_head.weight and _orig_mod.lm_head.weight are both lm_head.weight. Save the model again without "
        "its wrappers.",
    ),
    (
        both_kinds,
        "it holds two sets of weights, model.safetensors and the files of model.safetensors.index.json, and "
        "programs differ in which they read. Remove model.safetensors, or the index and its files.",
    ),
]


@pytest.mark.parametrize(("damage", "message"), FILES, ids=[message[:30] for _, message in FILES])
def test_files_that_are_not_a_whole_llama_are_refused(
    llama: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(llama)
    assert refusal(CheckpointError, llama).replace(str(llama), "DIR") == f"parent=hf:DIR: {message}"


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
    assert refusal(CheckpointError, llama, tied) == (
        f"parent=hf:{llama}: tie_word_embeddings is true, and lm_head.weight has other values than "
        "model.embed_tokens.weight. Set tie_word_embeddings to false in config.json, or remove lm_head.weight, "
        "whichever is the model."
    )
    (llama / "config.json").write_text(json.dumps(config()))
    check(llama)


def test_a_tied_head_is_compared_by_its_own_values(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks that the tensor is no multiple of.
    monkeypatch.setattr(hf_directory, "_BLOCK_BYTES", 1000)
    tied = MODEL.model_copy(update={"share_embeddings_and_output_weights": True})
    (llama / "config.json").write_text(json.dumps(config(tie_word_embeddings=True)))
    embedding = torch.randn(100, 24, generator=torch.Generator().manual_seed(0))
    # A tensor that is not read lies before the head in its file.
    rewrite(llama / "b.safetensors", **{"a.rotary_emb.inv_freq": torch.ones(4)})
    set_in_index(llama, "a.rotary_emb.inv_freq", "b.safetensors")
    rewrite(llama / "a.safetensors", **{"model.embed_tokens.weight": embedding})
    rewrite(llama / "b.safetensors", **{HEAD: embedding.clone()})
    check(llama, tied)
    changed = embedding.clone()
    changed[-1, -1] += 1
    rewrite(llama / "b.safetensors", **{HEAD: changed})
    assert "lm_head.weight has other values" in refusal(CheckpointError, llama, tied)
    rewrite(llama / "b.safetensors", **{HEAD: embedding.half()})
    assert "lm_head.weight has other values" in refusal(CheckpointError, llama, tied)


def test_one_changed_byte_changes_the_hash(llama: Path) -> None:
    before = HuggingFaceDirectory(llama).sha256()
    assert before == HuggingFaceDirectory(llama).sha256()
    data = bytearray((llama / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "b.safetensors").write_bytes(data)
    assert HuggingFaceDirectory(llama).sha256() != before


def test_the_hash_is_that_of_a_list_of_hashes(llama: Path) -> None:
    """As ``sha256sum config.json model.safetensors.index.json a.safetensors b.safetensors | sha256sum`` prints it."""
    names = ("config.json", INDEX, "a.safetensors", "b.safetensors")
    lines = [f"{hashlib.sha256((llama / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert HuggingFaceDirectory(llama).sha256() == hashlib.sha256("".join(lines).encode()).hexdigest()


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
