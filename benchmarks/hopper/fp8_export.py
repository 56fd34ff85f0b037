"""A Hugging Face directory in FP8 by ModelOpt on the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.measure import largest_error, seconds_of
from benchmarks.hopper.records import Row, at_most, holds, measured
from nemo_prolong.engine import dequantize, quantize_directory

# At the largest value of e4m3, 448, relative to it: half of the distance of neighbours, and half of that in bf16, in
# which ModelOpt divides by the scale.
_ROUNDING = (16 + 1) / 448
_LOGITS = 0.05
_SCALE = 1e-6


def write_model(bench: Bench, directory: Path) -> None:
    """Write a Llama of random weights in bf16: two layers of Llama-3-8B on a GPU, two thin ones on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=bench.sized(4096, 64),
        intermediate_size=bench.sized(14336, 128),
        num_attention_heads=bench.sized(32, 4),
        num_key_value_heads=bench.sized(8, 2),
        vocab_size=bench.sized(128_256, 256),
        max_position_embeddings=65_536,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a directory by its name."""
    from safetensors.torch import load_file

    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def run(bench: Bench) -> Iterator[Row]:
    """Quantize, then compare every matrix and the logits with the directory that it was made from."""
    source, output = bench.scratch / "bf16", bench.scratch / "fp8"
    write_model(bench, source)
    generator = torch.Generator().manual_seed(0)
    vocabulary, length = bench.sized(128_256, 256), bench.sized(8192, 64)
    documents = [torch.randint(0, vocabulary, (length,), generator=generator) for _ in range(4)]
    seconds = seconds_of(bench.device, lambda: quantize_directory(source, output, documents))
    yield measured("time of calibration and export", seconds, "s", note=f"4 documents of {length:,} tokens, 2 layers")
    original, quantized = tensors_of(source), tensors_of(output)
    matrices = [name for name in original if "_proj." in name]
    formats = {quantized[name].dtype for name in matrices}
    said = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    algorithms = (said["quant_algo"], said["kv_cache_quant_algo"])
    yield holds(
        "matrices of layers are in FP8, and the directory says so",
        formats == {torch.float8_e4m3fn} and algorithms == ("FP8", "FP8"),
        f"{len(matrices)} matrices, {sorted(map(str, formats))}, {algorithms}",
    )
    scales = [quantized[f"{name}_scale"] for name in matrices]
    expected = [original[name].abs().max().float() / 448 for name in matrices]
    yield at_most("scales: difference from the largest weight / 448", largest_error(scales, expected), _SCALE)
    restored = {name: dequantize(quantized[name], quantized[f"{name}_scale"]) for name in matrices}
    error = largest_error(restored.values(), [original[name] for name in matrices])
    yield at_most("weights: largest rounding", error, _ROUNDING)
    logits = [_logits(bench, source, weights, documents[0]) for weights in ({}, restored)]
    yield at_most("logits of rounded weights: difference from bf16", largest_error(logits[1:], logits[:1]), _LOGITS)


@torch.inference_mode()
def _logits(bench: Bench, directory: Path, weights: dict[str, torch.Tensor], document: torch.Tensor) -> torch.Tensor:
    """Return the logits of the last tokens of a document, with some weights replaced."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, local_files_only=True)
    model.load_state_dict(weights, strict=False)
    return model.to(bench.device)(document[None].to(bench.device), logits_to_keep=64).logits


STAGE = Stage(
    name="fp8_export",
    title="FP8 export",
    shows="A bf16 Hugging Face directory quantized by ModelOpt on the device: formats, scales and rounding of every "
    "matrix, and logits with the rounded weights.",
    run=run,
    needs=("nemo", "megatron", "modelopt", "transformers"),
)
