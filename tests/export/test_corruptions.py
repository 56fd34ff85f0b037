"""Every single thing that can go wrong with an exported directory is refused by its verification."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prolong.errors import ExportError
from nemo_prolong.export.assemble import verify
from nemo_prolong.export.hf_config import load_tokenizer
from nemo_prolong.export.source import open_source
from tests.support.export_tools import Workspace

INDEX = "model.safetensors.index.json"
LAYER = "model.layers.1."
LOST = object()

Corruption = Callable[[Path], None]


def edited(file: str, *keys: str, to: Any) -> Corruption:
    """Return what sets one entry of a JSON file, or takes it out."""

    def corrupt(directory: Path) -> None:
        content = json.loads((directory / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if to is LOST:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to
        (directory / file).write_text(json.dumps(content))

    return corrupt


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Corruption:
    """Return what changes one tensor where it lies."""

    def corrupt(directory: Path) -> None:
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name] = change(tensors[name]).contiguous()
                save_file(tensors, path, metadata={"format": "pt"})

    return corrupt


def swapped(first: str, second: str) -> Corruption:
    """Return what exchanges two tensors."""

    def corrupt(directory: Path) -> None:
        tensors = {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}
        tensor(first, lambda _: tensors[second])(directory)
        tensor(second, lambda _: tensors[first])(directory)

    return corrupt


def shard(change: Callable[[Path], object]) -> Corruption:
    """Return what does something to the third file of weights."""
    return lambda directory: change(sorted(directory.glob("*.safetensors"))[2]) and None


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def written(file: str, change: Callable[[str], str]) -> Corruption:
    """Return what changes the text of a file."""
    return lambda directory: (directory / file).write_text(change((directory / file).read_text())) and None


def exchange_two_tokens(text: str) -> str:
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return json.dumps(tokenizer)


CORRUPTIONS: dict[str, tuple[Corruption, str]] = {
    "rope_theta lost": (edited("config.json", "rope_theta", to=LOST), "config.json rope_theta=None"),
    "rope_theta of the parent": (edited("config.json", "rope_theta", to=10000.0), "config.json rope_theta=10000.0"),
    "base lost in rope_parameters": (
        edited("config.json", "rope_parameters", "rope_theta", to=LOST),
        "config.json rope_parameters=",
    ),
    "rope_parameters lost": (edited("config.json", "rope_parameters", to=LOST), "config.json rope_parameters=None"),
    "scaling invented": (
        edited("config.json", "rope_scaling", to={"rope_type": "linear", "factor": 8.0}),
        "config.json rope_scaling=",
    ),
    "length": (edited("config.json", "max_position_embeddings", to=8192), "config.json max_position_embeddings=8192"),
    "dtype for transformers 4": (edited("config.json", "torch_dtype", to="float16"), "config.json torch_dtype="),
    "dtype for transformers 5": (edited("config.json", "dtype", to="bfloat16"), "config.json dtype="),
    "epsilon": (edited("config.json", "rms_norm_eps", to=1e-6), "config.json rms_norm_eps="),
    "head tied": (edited("config.json", "tie_word_embeddings", to=True), "config.json tie_word_embeddings=True"),
    "key-value heads": (edited("config.json", "num_key_value_heads", to=4), "config.json num_key_value_heads=4"),
    "padded vocabulary": (edited("config.json", "vocab_size", to=640), "config.json vocab_size=640"),
    "remote code": (edited("config.json", "auto_map", to={"AutoModel": "evil.Model"}), "config.json auto_map="),
    "config.json cut off": (written("config.json", lambda text: text[:-20]), "config.json: .* cannot be read back"),
    "stop id lost": (
        edited("generation_config.json", "eos_token_id", to=[497]),
        "generation_config.json eos_token_id=",
    ),
    "sampling set": (edited("generation_config.json", "do_sample", to=True), "generation_config.json do_sample=True"),
    "generation_config.json lost": (
        lambda directory: (directory / "generation_config.json").unlink(),
        "generation_config.json: .* cannot be read back",
    ),
    "keys and values swapped": (
        swapped(f"{LAYER}self_attn.k_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
        "values differ from decoder.layers.self_attention.linear_qkv.weight of layer 1",
    ),
    "heads in another order": (
        tensor(f"{LAYER}self_attn.q_proj.weight", lambda q: q.reshape(4, 16, 64).flip(0).reshape(64, 64)),
        "values differ from decoder.layers.self_attention.linear_qkv.weight of layer 1",
    ),
    "gate and up swapped": (
        swapped(f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"),
        "values differ from decoder.layers.mlp.linear_fc1.weight of layer 1",
    ),
    "layers swapped": (
        swapped("model.layers.0.mlp.down_proj.weight", f"{LAYER}mlp.down_proj.weight"),
        "values differ from decoder.layers.mlp.linear_fc2.weight of layer 0",
    ),
    "norms swapped": (
        swapped(f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"),
        "values differ from decoder.layers.self_attention.linear_qkv.layer_norm_weight of layer 1",
    ),
    "output projection transposed": (
        tensor(f"{LAYER}self_attn.o_proj.weight", torch.t),
        "values differ from decoder.layers.self_attention.linear_proj.weight of layer 1",
    ),
    "head is the embedding": (
        lambda directory: tensor(
            "lm_head.weight", lambda _: load_file(directory / "model-00001-of-00006.safetensors").popitem()[1]
        )(directory),
        "values differ from output_layer.weight",
    ),
    "tensor in half precision": (
        tensor("model.norm.weight", torch.Tensor.half),
        r"model.norm.weight: .* it is \[64\] F16, not \[64\] F32",
    ),
    "vocabulary with padding": (
        tensor("model.embed_tokens.weight", lambda weight: torch.cat([weight, weight[:128]])),
        r"model.embed_tokens.weight: .* it is \[640, 64\]",
    ),
    "negative zero": (
        tensor("model.norm.weight", lambda weight: torch.where(torch.arange(64) == 0, -weight, weight)),
        "1 values differ from decoder.final_layernorm.weight",
    ),
    "a bit flipped": (shard(flip_last_bit), "1 values differ from decoder.layers"),
    "shard lost": (shard(Path.unlink), "tensors missing or too many: model.layers"),
    "shard cut off": (shard(lambda path: path.write_bytes(path.read_bytes()[:-1])), "the file cannot be read back"),
    "shard twice": (
        shard(lambda path: shutil.copy(path, path.with_name("model-00099-of-00099.safetensors"))),
        "model-00099-of-00099.safetensors .*: .* holds it too",
    ),
    "index to the wrong file": (
        edited(INDEX, "weight_map", "model.norm.weight", to="model-00001-of-00006.safetensors"),
        f"{INDEX}: .* does not say where the tensors are",
    ),
    "index with the wrong size": (edited(INDEX, "metadata", "total_size", to=1), f"{INDEX}: .* total_size is not"),
    "template changed": (written("chat_template.jinja", lambda text: text + " "), "its chat template is not that of"),
    "template in the tokenizer changed": (
        edited("tokenizer_config.json", "chat_template", to="{{ messages }}"),
        "tokenizer_config.json chat_template=",
    ),
    "length in the tokenizer": (
        edited("tokenizer_config.json", "model_max_length", to=8192),
        "tokenizer_config.json model_max_length=8192",
    ),
    "beginning of a document": (
        edited("tokenizer_config.json", "bos_token", to="<|eot_id|>"),
        "tokenizer_config.json bos_token=",
    ),
    "two tokens exchanged": (written("tokenizer.json", exchange_two_tokens), "tokenizer.json: .* it is not that of"),
    "a pickle beside the weights": (
        lambda directory: (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.") and None,
        "pytorch_model.bin: .* the export wrote no such file",
    ),
}


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """The export as it is when it is verified: before its card and its manifest are written."""
    return shutil.copytree(
        exported, tmp_path / "hf", ignore=shutil.ignore_patterns("README.md", "export_manifest.json")
    )


def verify_child(workspace: Workspace, directory: Path) -> None:
    source = open_source(str(workspace.child))
    verify(source, load_tokenizer(source.tokenizer), directory, torch.float32)


def test_the_copy_passes_before_it_is_corrupted(workspace: Workspace, copy: Path) -> None:
    verify_child(workspace, copy)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_refused(workspace: Workspace, copy: Path, name: str) -> None:
    corrupt, message = CORRUPTIONS[name]
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    corrupt(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} != before, "nothing was corrupted"
    with pytest.raises(ExportError, match=message):
        verify_child(workspace, copy)
