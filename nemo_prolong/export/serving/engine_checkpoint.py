"""Compare a checkpoint of TensorRT-LLM's former engine builder with the verified bf16 directory it was made from.

Its ranks are joined again: tensor-parallel parts along the dim they were cut, pipeline parts by their layers. In bf16
all tensors are equal to the bit. In FP8 the matrices of the layers are equal after rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_prolong.config.schema import ExportTargetConfig, ModelConfig
from nemo_prolong.export.serving.quantized import Dequantize, TensorFiles, same_bits, verify_rounding
from nemo_prolong.export.verify import mismatch

_LAYER = {
    # Name in the engine's checkpoint: names in the directory, dim that tensor parallelism cuts. `fc` is the gate.
    "attention.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
    "attention.dense": (("self_attn.o_proj",), 1),
    "mlp.fc": (("mlp.gate_proj",), 0),
    "mlp.gate": (("mlp.up_proj",), 0),
    "mlp.proj": (("mlp.down_proj",), 1),
    "input_layernorm": (("input_layernorm",), None),
    "post_layernorm": (("post_attention_layernorm",), None),
}


def verify_engine_checkpoint(
    original: Path,
    checkpoint: Path,
    model: ModelConfig,
    context_length: int,
    target: ExportTargetConfig,
    dequantize: Dequantize,
) -> int:
    """Check configuration and every tensor.

    Args:
        original: Hugging Face directory in bf16.
        checkpoint: Directory with ``config.json`` and ``rankN.safetensors``.
        model: The model.
        context_length: Advertised tokens.
        target: How it was asked for.
        dequantize: Reads an FP8 weight with its scale.

    Returns:
        How many tensors of the checkpoint were compared, over all ranks.

    Raises:
        ExportError: Naming the first thing that differs.
    """
    _verify_config(checkpoint, model, context_length, target)
    source, compared = TensorFiles.of(original), 0
    tensor, pipeline = target.tensor_parallel_size, target.pipeline_parallel_size
    for stage in range(pipeline):
        paths = [checkpoint / f"rank{stage * tensor + rank}.safetensors" for rank in range(tensor)]
        ranks = [TensorFiles([path]) for path in paths]
        expected = list(_expected(model, stage, pipeline))
        for name, parts, dim in expected:
            originals = [source.read(part) for part in parts]
            _verify_tensor(name, originals, dim, ranks, dequantize)
        _verify_names(paths, {name for name, _, _ in expected})
        compared += len(expected) * tensor
    return compared


def _verify_config(checkpoint: Path, model: ModelConfig, context_length: int, target: ExportTargetConfig) -> None:
    found = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensor, pipeline = target.tensor_parallel_size, target.pipeline_parallel_size
    algorithm = "FP8" if target.quantization == "fp8" else None
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_size": model.kv_channels,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "norm_epsilon": model.layernorm_epsilon,
        "rotary_base": model.rotary_base,
        "max_position_embeddings": context_length,
        "mapping": {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline},
    }
    for key, value in expected.items():
        if found.get(key) != value:
            raise mismatch(f"config.json {key}={found.get(key)}", f"the model has {value}")
    quantization = found["quantization"]
    if (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) != (algorithm, algorithm):
        raise mismatch("config.json quantization", f"it says {quantization}, not {algorithm}")


def _expected(model: ModelConfig, stage: int, stages: int) -> Iterator[tuple[str, list[str], int | None]]:
    """Yield name, source names and cut dim of what the ranks of a pipeline stage hold."""
    per_stage = model.num_layers // stages
    if stage == 0:
        yield "transformer.vocab_embedding.weight", ["model.embed_tokens.weight"], 0
    for layer in range(per_stage):
        for name, (parts, dim) in _LAYER.items():
            sources = [f"model.layers.{stage * per_stage + layer}.{part}.weight" for part in parts]
            yield f"transformer.layers.{layer}.{name}.weight", sources, dim
    if stage == stages - 1:
        head = "model.embed_tokens" if model.share_embeddings_and_output_weights else "lm_head"
        yield "transformer.ln_f.weight", ["model.norm.weight"], None
        yield "lm_head.weight", [f"{head}.weight"], 0


def _verify_tensor(
    name: str, originals: list[Tensor], dim: int | None, ranks: list[TensorFiles], dequantize: Dequantize
) -> None:
    """Compare the part of every rank: its share of each source, one below the other."""
    for rank, files in enumerate(ranks):
        if name not in files.names:
            raise mismatch(name, f"rank {rank} of its stage does not hold it")
        cut = [part if dim is None else part.chunk(len(ranks), dim)[rank] for part in originals]
        expected, found = torch.cat(cut), files.read(name)
        if found.dtype == torch.float8_e4m3fn and name.startswith("transformer.layers."):
            scale = files.read(f"{name}s_scaling_factor").squeeze()
            verify_rounding(name, expected.float(), found, scale, dequantize)
        elif not same_bits(expected, found):
            raise mismatch(name, f"rank {rank} of its stage holds other values")


def _verify_names(paths: list[Path], expected: set[str]) -> None:
    for path in paths:
        with safe_open(path, framework="pt") as file:
            unknown = {name for name in file.keys() if not name.endswith("_scaling_factor")} - expected
        if unknown:
            raise mismatch(path.name, f"it holds {', '.join(sorted(unknown)[:3])}, which the model has not")
