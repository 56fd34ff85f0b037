"""ModelOpt: a Hugging Face directory in FP8, and the checkpoint of TensorRT-LLM's former engine builder.

This is the only module that imports modelopt. That import takes seconds and loads Megatron. Both ways start from a
written and verified bf16 directory, so that what is quantized is what was compared with the source. They run on the GPU
if there is one. On a CPU ModelOpt's eager path computes the same scales.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

log = logging.getLogger(__name__)

DTYPE = torch.bfloat16
"""Of everything that is not FP8. ModelOpt's own default for some exporters is fp16, in which Llamas overflow."""


def quantize_directory(directory: Path, output: Path, documents: Iterable[Tensor]) -> None:
    """Write the weights of a bf16 directory in FP8, with scales for activations, keys and values.

    Every matrix of the layers becomes ``float8_e4m3fn`` with one fp32 scale; embedding, norms and LM head stay bf16.

    Args:
        directory: A Hugging Face directory in bf16; it is not changed.
        output: Receives safetensors, ``hf_quant_config.json`` and ModelOpt's ``config.json``.
        documents: int64 [T] each, to calibrate on.
    """
    model = _load(directory)
    _quantize(model, documents)
    export_hf_checkpoint(model, dtype=DTYPE, export_dir=output)


def write_engine_checkpoint(
    directory: Path,
    output: Path,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    documents: Iterable[Tensor] | None,
) -> None:
    """Write ``config.json`` and one ``rankN.safetensors`` per rank, for ``trtllm-build`` of TensorRT-LLM <= 1.2.

    Args:
        directory: A Hugging Face directory in bf16; it is not changed.
        output: Receives the files.
        tensor_parallel_size: Ranks that share every layer; must divide the key-value heads.
        pipeline_parallel_size: Ranks that share the layers in order; must divide them.
        documents: int64 [T] each, to calibrate FP8 on; None writes bf16.
    """
    model = _load(directory)
    if documents is not None:
        _quantize(model, documents)
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model,
            decoder_type="llama",
            dtype=DTYPE,
            export_dir=output,
            inference_tensor_parallel=tensor_parallel_size,
            inference_pipeline_parallel=pipeline_parallel_size,
        )


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Return an FP8 weight as ModelOpt reads it.

    Args:
        weight: float8_e4m3fn, any shape.
        scale: float32 [].

    Returns:
        float32, the shape of ``weight``.
    """
    return FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)


def _load(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPE, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _quantize(model: nn.Module, documents: Iterable[Tensor]) -> None:
    """Insert quantizers and let them see the documents."""
    mtq.quantize(model, _fp8_config(), _calibration(documents))


def _fp8_config() -> dict[str, Any]:
    """Return FP8 for weights, activations, keys and values: one scale a tensor, from the largest value seen."""
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].update(mtq.FP8_KV_CFG["quant_cfg"])
    return config


def _calibration(documents: Iterable[Tensor]) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        layers, device, tokens = model.get_submodule("model"), next(model.parameters()).device, 0
        with torch.inference_mode():
            for document in documents:
                # The layers alone: logits of a long document are gigabytes, and the LM head is not quantized.
                layers(document[None].to(device), use_cache=False)
                tokens += len(document)
        log.info("calibrated on %d tokens", tokens)

    return run
