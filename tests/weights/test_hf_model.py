"""A Hugging Face directory in plain transformers: what is loaded, and what is said of weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_prolong.weights.hf_model import load_model

SINGLE = "model.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(directory / SINGLE), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.bfloat16), (torch.float32, torch.float32)])
def test_the_weights_of_the_files_are_loaded_for_evaluation(llama: Path, dtype: str, loaded: torch.dtype) -> None:
    model, problems = load_model(llama, dtype)
    assert problems == {} and not model.training
    head = load_file(llama / SINGLE)[HEAD]
    assert model.lm_head.weight.dtype == loaded and torch.equal(model.lm_head.weight, head.to(loaded))


def test_weights_that_are_missing_or_unknown_are_named(llama: Path) -> None:
    change_tensors(llama, **{HEAD: None, "model.a": torch.ones(1), "model.b": torch.ones(1)})
    problems = load_model(llama, "auto").problems
    assert problems == {"missing_keys": [HEAD], "unexpected_keys": ["model.a", "model.b"]}


def test_a_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    # transformers would take the name for one of the Hub.
    with pytest.raises(FileNotFoundError, match=f"^there is no directory {tmp_path}/none, seen from"):
        load_model(tmp_path / "none", "auto")


def test_pickles_are_not_opened(llama: Path) -> None:
    torch.save(load_file(llama / SINGLE), llama / "pytorch_model.bin")
    (llama / SINGLE).unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model(llama, "auto")


def test_no_code_of_the_directory_is_run(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (llama / "config.json").write_text(json.dumps(config))
    was_run = llama / "was_run"
    (llama / "own.py").write_text(f"open({str(was_run)!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(llama, "auto")
    assert not was_run.exists()
