"""Turn a verified Hugging Face directory into what a server starts from.

What can be refused is refused before the export begins. The rest happens in the export's working directory, so that the
output appears with everything in it or not at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_prolong.config.schema import ExportConfig, ExportTargetConfig, ModelConfig
from nemo_prolong.engine import dequantize, quantize_directory, write_engine_checkpoint
from nemo_prolong.errors import ConfigError, ExportError
from nemo_prolong.export.rendering import render
from nemo_prolong.export.serving.memory import KV_BLOCK_TOKENS, check_memory
from nemo_prolong.export.serving.settings import trtllm_settings, vllm_settings, write_settings
from nemo_prolong.files import write_json_atomically, write_text_atomically
from nemo_prolong.records.export_manifest import QuantizationRecord, TargetRecord
from nemo_prolong.records.stage_manifest import StageManifest

if TYPE_CHECKING:  # torch takes seconds to import, and a target is checked without it
    from torch import Tensor

log = logging.getLogger(__name__)

SETTINGS_FILE = "serve.yaml"
START_FILE = "serve.sh"
CHECK_FILE = "check_server.py"

_SERVERS = ("trtllm", "vllm")
"""Formats that a server starts from."""


def check_target(cfg: ExportConfig, model: ModelConfig, advertised_context_length: int) -> None:
    """Refuse what cannot be prepared, before anything is written; needs no torch.

    Args:
        cfg: The export.
        model: What is exported.
        advertised_context_length: Of the run, in tokens.

    Raises:
        ConfigError: If settings contradict each other.
        ExportError: If the model does not fit on the device, or cannot be expressed.
    """
    target = cfg.export
    if target.format == "hf":
        _check_plain(target)
    elif cfg.dtype != "bf16":
        raise ConfigError(
            f"dtype={cfg.dtype}", f"export={target.format} serves bf16 or FP8 of bf16.", "Set dtype=bf16."
        )
    if target.push_to_hub and not cfg.verify:
        raise ConfigError("verify=false", "only what was compared is published.", "Set verify=true.")
    if target.format == "trtllm_engine_checkpoint":
        _check_engine(model, target)
    elif target.pipeline_parallel_size > 1:
        raise ConfigError(
            f"export.pipeline_parallel_size={target.pipeline_parallel_size}",
            "belongs to trtllm_engine_checkpoint.",
            "Set export.pipeline_parallel_size=1, or more export.tensor_parallel_size.",
        )
    if target.format in _SERVERS:
        if target.max_num_tokens % KV_BLOCK_TOKENS:
            nearest = max(target.max_num_tokens // KV_BLOCK_TOKENS, 1) * KV_BLOCK_TOKENS
            raise ConfigError(
                f"export.max_num_tokens={target.max_num_tokens}",
                f"chunks of a prompt are whole blocks of {KV_BLOCK_TOKENS} tokens.",
                f"Set export.max_num_tokens={nearest}.",
            )
        if target.max_batch_size > target.max_num_tokens:
            raise ConfigError(
                f"export.max_batch_size={target.max_batch_size}",
                f"a step has a token of every request, and export.max_num_tokens is {target.max_num_tokens}.",
                f"Set export.max_batch_size={target.max_num_tokens}, or more export.max_num_tokens.",
            )
        check_memory(model, advertised_context_length, target)


def _check_plain(target: ExportTargetConfig) -> None:
    if target.quantization is not None:
        raise ConfigError(
            f"export.quantization={target.quantization}",
            "transformers does not read it: the scales would be ignored without an error.",
            "Set export=trtllm or export=vllm, or export.quantization=null.",
        )


def _check_engine(model: ModelConfig, target: ExportTargetConfig) -> None:
    tensor, pipeline = target.tensor_parallel_size, target.pipeline_parallel_size
    if model.num_query_groups % tensor or model.num_layers % pipeline:
        raise ExportError(
            f"export.tensor_parallel_size={tensor} export.pipeline_parallel_size={pipeline}",
            f"must divide the {model.num_query_groups} key-value heads and the {model.num_layers} layers.",
            "Set export.tensor_parallel_size=1 export.pipeline_parallel_size=1.",
        )
    if model.rope_scaling is not None:
        raise ExportError(
            "model.rope_scaling",
            "ModelOpt 0.37 does not write it into an engine's checkpoint.",
            "Set export=trtllm, which needs no engine.",
        )


def prepare_target(cfg: ExportConfig, manifest: StageManifest, directory: Path) -> TargetRecord | None:
    """Quantize the directory or cut it for ranks, and add what a server needs.

    Args:
        cfg: The export, checked by ``check_target``.
        manifest: Of the run.
        directory: The bf16 directory, complete but for its card and manifest.

    Returns:
        What was done, for the manifest; None for a plain directory.

    Raises:
        DataError: If the run's data is gone and FP8 is to be calibrated on it.
        ExportError: If the result does not equal the directory.
    """
    target = cfg.export
    if target.format == "hf":
        return None
    if target.format == "trtllm_engine_checkpoint":
        quantization = _cut_for_engine(cfg, manifest, directory)
    else:
        quantization = _quantize(cfg, manifest, directory) if target.quantization is not None else None
        _write_server_files(target, manifest, directory)
    return TargetRecord(
        format=target.format,
        gpu=target.gpu,
        tensor_parallel_size=target.tensor_parallel_size,
        pipeline_parallel_size=target.pipeline_parallel_size,
        quantization=quantization,
    )


def _quantize(cfg: ExportConfig, manifest: StageManifest, directory: Path) -> QuantizationRecord:
    """Replace the weights by FP8 ones; the configuration stays that of the verified directory."""
    from nemo_prolong.export.serving.quantized import (
        QUANT_CONFIG_FILE,
        logit_difference,
        verify_quantization,
        verify_weights,
    )

    documents, record = _calibration(cfg.export, manifest)
    with _replaced_weights(directory) as quantized:
        quantize_directory(directory, quantized, documents)
        inline = json.loads((quantized / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        # Of ModelOpt's own config.json only this: the rest went through transformers, which drops rope_parameters.
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        write_json_atomically(quantized / "config.json", {**config, "quantization_config": inline})
        if cfg.verify:
            verify_quantization(quantized)
            matrices = verify_weights(directory, quantized, dequantize)
            difference = logit_difference(directory, quantized, max(documents, key=len), dequantize)
            log.info("FP8: logits of the dequantized weights differ by %.1f%%", 100 * difference)
            record = record.model_copy(update={"verified_matrices": matrices, "relative_logit_difference": difference})
        _keep_only(quantized, {"config.json", QUANT_CONFIG_FILE, "model.safetensors.index.json"})
    return record


def _cut_for_engine(cfg: ExportConfig, manifest: StageManifest, directory: Path) -> QuantizationRecord | None:
    """Replace weights and configuration by those of every rank of an engine."""
    from nemo_prolong.export.serving.engine_checkpoint import verify_engine_checkpoint

    target, documents, record = cfg.export, None, None
    if target.quantization is not None:
        documents, record = _calibration(target, manifest)
    with _replaced_weights(directory) as checkpoint:
        write_engine_checkpoint(
            directory, checkpoint, target.tensor_parallel_size, target.pipeline_parallel_size, documents
        )
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        # ModelOpt writes float16, which overflows where TensorRT-LLM's own converters wrote float32.
        write_json_atomically(checkpoint / "config.json", {**config, "logits_dtype": "float32"})
        if cfg.verify:
            compared = verify_engine_checkpoint(
                directory, checkpoint, manifest.model, manifest.advertised_context_length, target, dequantize
            )
            log.info("%d tensors of %d ranks are those of the directory", compared, config["mapping"]["world_size"])
        _keep_only(checkpoint, {"config.json"})
    return record


def _calibration(target: ExportTargetConfig, manifest: StageManifest) -> tuple[list[Tensor], QuantizationRecord]:
    """Return the documents to calibrate on, int64 [T] each, and what to say about them."""
    from nemo_prolong.export.serving.calibration import calibration_documents

    documents = calibration_documents(manifest, target.calibration_rows, target.calibration_length)
    return documents, QuantizationRecord(
        algorithm="FP8",
        kv_cache_algorithm="FP8",
        modelopt=importlib.metadata.version("nvidia-modelopt"),
        calibration_rows=target.calibration_rows,
        calibration_length=target.calibration_length,
        calibration_documents=len(documents),
        calibration_tokens=sum(map(len, documents)),
    )


@contextmanager
def _replaced_weights(directory: Path) -> Iterator[Path]:
    """Give an empty directory whose files take the place of the weights of ``directory`` when all went well."""
    replacement = directory / ".replacement"
    replacement.mkdir()
    yield replacement
    for path in [*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"]:
        path.unlink()
    for path in replacement.iterdir():
        path.replace(directory / path.name)
    replacement.rmdir()


def _keep_only(directory: Path, names: set[str]) -> None:
    """Remove what a library wrote beside the weights and ``names``."""
    for path in directory.iterdir():
        if path.name not in names and path.suffix != ".safetensors":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_server_files(target: ExportTargetConfig, manifest: StageManifest, directory: Path) -> None:
    context_length = manifest.advertised_context_length
    make = vllm_settings if target.format == "vllm" else trtllm_settings
    plan = check_memory(manifest.model, context_length, target)
    write_settings(directory / SETTINGS_FILE, make(target, context_length), target, plan)
    script = render("serve.sh.j2", server=target.format, start_file=START_FILE, settings_file=SETTINGS_FILE)
    write_text_atomically(directory / START_FILE, script)
    (directory / START_FILE).chmod(0o755)
    write_text_atomically(directory / CHECK_FILE, (files(__package__) / CHECK_FILE).read_text(encoding="utf-8"))
