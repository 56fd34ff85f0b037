"""A Hugging Face directory of a small Llama, and what is said of one that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
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

# Remedies.
WITHOUT_THESE = "Start from a Llama without these."
UNQUANTIZED = "Start from the weights in BF16, F16 or F32 that these were made of, or dequantize them first."
WRONG_BASE = "Correct config.json: with the wrong base the model fails on every long text."
CORRECT_IT = "Correct config.json."
MERGE = "Merge it first (merge_and_unload() and save_pretrained(DIR) of PeftModel), and name that directory."
THIS_MODEL = "Use the model of the directory: set model=..., or these fields."
NO_SCALING = "Start from a model without RoPE scaling or with llama3."
OR_CORRECT_IT = "Download the model again, or correct config.json."


def config(model: ModelConfig = MODEL, **changes: Any) -> dict[str, Any]:
    """Return ``config.json``; ``changes`` replace its keys."""
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


def write_llama(directory: Path) -> Path:
    """Write a directory of two shards, of zeros."""
    shapes = [(name, shape) for p in pieces(MODEL) for name, shape in zip(p.names, p.shapes, strict=True)]
    files = {"a.safetensors": dict(shapes[:6]), "b.safetensors": dict(shapes[6:])}
    for file, tensors in files.items():
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config()))
    return directory


def check(directory: Path, model: ModelConfig = MODEL) -> HuggingFaceDirectory:
    """Read a directory and check it as the parent of a stage."""
    found = HuggingFaceDirectory(directory)
    found.check_fields(model)
    found.check_tensors(model)
    return found


def refusal(kind: type[Exception], directory: Path, model: ModelConfig = MODEL) -> str:
    """Return why a directory is refused."""
    with pytest.raises(kind) as error:
        check(directory, model)
    assert type(error.value) is kind
    message = str(error.value)
    assert message.startswith(f"parent=hf:{directory}: ")
    return message
