"""What the files of a Hugging Face directory must be before a stage starts from it; every refusal names the fault."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights import hf_directory
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.hf_reader import HuggingFaceReader
from nemo_prolong.weights.names import pieces
from tests.support.hf_llama import (
    INDEX,
    MERGE,
    MODEL,
    OR_CORRECT_IT,
    UNQUANTIZED,
    check,
    config,
    refusal,
)


def test_a_whole_directory_is_accepted(llama: Path) -> None:
    found = check(llama)
    assert (found.rotary_base, found.rope_scaling, found.context_length) == (500000.0, None, 8192)


def test_one_file_without_index_or_in_half_precision_is_accepted(llama: Path) -> None:
    tensors = load_file(llama / "a.safetensors") | load_file(llama / "b.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, llama / "model.safetensors")
    for name in (INDEX, "a.safetensors", "b.safetensors"):
        (llama / name).unlink()
    check(llama)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_of_any_name_are_named(llama: Path, file: str) -> None:
    only_pickles(llama)
    (llama / "pytorch_model.bin").rename(llama / file)
    assert f"its weights are pickles ({file}), which can run code" in refusal(CheckpointError, llama)


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_quantization_that_a_file_beside_the_weights_describes_is_refused(llama: Path, file: str) -> None:
    (llama / file).write_text("{}")
    assert f"its weights are quantized ({file})." in refusal(CheckpointError, llama)


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
