"""Tiny Llamas as Hugging Face writes them: version 3, 3.1 with scaled RoPE, 3.2 with a tied LM head."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-3": {},
    "llama-3.1": {"rope_scaling": SCALING, "max_position_embeddings": 512},
    "llama-3.2": {"rope_scaling": {**SCALING, "factor": 32.0}, "tie_word_embeddings": True},
}


def write_llama(directory: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """Write a Llama of the shape of ``tiny_config``, in several shards; ``changes`` replace configuration fields."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.02,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms of one hide a norm in the wrong place.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(directory, max_shard_size="60KB")
    return directory


def copy_with_tokenizer(directory: Path, tokenizer: Path) -> None:
    """Put the tokenizer's files into a model's directory."""
    for path in tokenizer.iterdir():
        shutil.copy(path, directory / path.name)
