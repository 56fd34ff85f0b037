"""What the layouts are compared with: Hugging Face's Llama in float64, one document at a time.

The weights go from Megatron's names and shapes to Hugging Face's by code of its own, not by the export's.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_prolong.config.schema import ModelConfig


class Scored(NamedTuple):
    """Losses and gradients of a list of documents.

    Attributes:
        token_losses: One tensor per document, float64 [length - 1].
        gradients: Gradient of the mean over all targets, by Megatron's name without wrappers.
    """

    token_losses: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]


def score(weights: dict[str, torch.Tensor], model: ModelConfig, documents: list[torch.Tensor]) -> Scored:
    """Return losses and gradients of ``documents``, each int64 [length]."""
    llama = build(weights, model)
    losses = [
        torch.nn.functional.cross_entropy(llama(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        for ids in documents
        if len(ids) > 1
    ]
    targets = sum(len(part) for part in losses)
    (sum(part.sum() for part in losses) / targets).backward()
    gradients = {name: parameter.grad for name, parameter in llama.named_parameters()}
    scored = iter(losses)
    by_document = [next(scored).detach() if len(ids) > 1 else torch.zeros(0).double() for ids in documents]
    return Scored(by_document, megatron_names(gradients, model))


def build(weights: dict[str, torch.Tensor], model: ModelConfig) -> LlamaForCausalLM:
    """Return the model of Megatron's weights in float64."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        rms_norm_eps=model.layernorm_epsilon,
        rope_theta=model.rotary_base,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).double()
    state = {}
    for layer in range(model.num_layers):
        ours = {key.removeprefix("decoder.layers."): value[layer] for key, value in weights.items() if "layers" in key}
        state |= {f"model.layers.{layer}.{name}": value.double() for name, value in _one_layer(ours, model).items()}
    state["model.embed_tokens.weight"] = weights["embedding.word_embeddings.weight"][: model.vocab_size].double()
    state["model.norm.weight"] = weights["decoder.final_layernorm.weight"].double()
    state["lm_head.weight"] = weights["output_layer.weight"][: model.vocab_size].double()
    llama.load_state_dict(state)
    return llama


def _one_layer(ours: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    per_group = model.num_attention_heads // model.num_query_groups
    heads = ours["self_attention.linear_qkv.weight"].view(
        model.num_query_groups, per_group + 2, model.kv_channels, model.hidden_size
    )
    gate, up = ours["mlp.linear_fc1.weight"].chunk(2)
    return {
        "input_layernorm.weight": ours["self_attention.linear_qkv.layer_norm_weight"],
        "post_attention_layernorm.weight": ours["mlp.linear_fc1.layer_norm_weight"],
        "self_attn.q_proj.weight": heads[:, :per_group].reshape(-1, model.hidden_size),
        "self_attn.k_proj.weight": heads[:, per_group].reshape(-1, model.hidden_size),
        "self_attn.v_proj.weight": heads[:, per_group + 1].reshape(-1, model.hidden_size),
        "self_attn.o_proj.weight": ours["self_attention.linear_proj.weight"],
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": ours["mlp.linear_fc2.weight"],
    }


def megatron_names(theirs: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Return tensors of Hugging Face's names under Megatron's, layers stacked, without rows of padding."""

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([theirs[f"model.layers.{layer}.{name}.weight"] for layer in range(model.num_layers)])

    layers, groups = model.num_layers, model.num_query_groups
    heads = [
        stacked(f"self_attn.{part}_proj").view(layers, groups, -1, model.kv_channels, model.hidden_size)
        for part in "qkv"
    ]
    prefix = "decoder.layers."
    return {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
        f"{prefix}self_attention.linear_qkv.layer_norm_weight": stacked("input_layernorm"),
        f"{prefix}mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm"),
        f"{prefix}self_attention.linear_qkv.weight": torch.cat(heads, dim=2).flatten(1, 3),
        f"{prefix}self_attention.linear_proj.weight": stacked("self_attn.o_proj"),
        f"{prefix}mlp.linear_fc1.weight": torch.cat([stacked("mlp.gate_proj"), stacked("mlp.up_proj")], dim=1),
        f"{prefix}mlp.linear_fc2.weight": stacked("mlp.down_proj"),
    }


def documents_of(tokens: torch.Tensor, cu_seqlens: torch.Tensor, real_tokens: int) -> list[torch.Tensor]:
    """Return the documents of a row, without its padding."""
    bounds = [min(int(bound), real_tokens) for bound in cu_seqlens]
    return [tokens[start:end] for start, end in pairwise(bounds) if end > start]
