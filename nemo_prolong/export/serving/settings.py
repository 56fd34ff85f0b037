"""The servers' own settings: names and types as the servers read them, and the YAML files that hold them.

A name that a server does not know stops it at start-up (TensorRT-LLM's arguments forbid extra keys), so the names are
kept here, each class with the source it was read from. Only what an export sets is listed. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from nemo_prolong.config.schema import ExportTargetConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.rendering import render
from nemo_prolong.export.serving.memory import FIXED_RESERVE_BYTES, KV_CACHE_FRACTION, MemoryPlan
from nemo_prolong.files import write_text_atomically

MemoryShare = Annotated[float, Field(gt=0.0, le=1.0)]


class _Settings(BaseModel):
    """Base: no unknown keys, no conversions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        populate_by_name=True,
        alias_generator=None,
    )


class TrtllmKvCacheSettings(_Settings):
    """``KvCacheConfig`` of TensorRT-LLM, as of ``TrtllmSettings``."""

    dtype: Literal["auto", "fp8"]
    free_gpu_memory_fraction: MemoryShare


class TrtllmSettings(_Settings):
    """``LlmArgs`` of TensorRT-LLM: ``tensorrt_llm/llmapi/llm_args.py``.

    Read from the 1.3 development branch and from main, commit 0004396720054fd8e205cbf616f21f0b57c6b412. The docs of 1.0
    to 1.2 name the same fields.
    """

    tensor_parallel_size: PositiveInt
    max_seq_len: PositiveInt
    max_batch_size: PositiveInt
    max_num_tokens: PositiveInt
    enable_chunked_prefill: bool
    kv_cache_config: TrtllmKvCacheSettings


class VllmSettings(_Settings):
    """Arguments of ``vllm serve`` with the words joined by hyphens, as its ``--config`` file wants them.

    Read from the help of vLLM 0.27.1 and from ``vllm/config`` of main, commit 002f10e0cfa1373a19a0d2756598a34b700d20e5.
    """

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    dtype: Literal["bfloat16"]
    tensor_parallel_size: PositiveInt
    max_model_len: PositiveInt
    max_num_seqs: PositiveInt
    max_num_batched_tokens: PositiveInt
    enable_chunked_prefill: bool
    kv_cache_dtype: Literal["auto", "fp8"]
    gpu_memory_utilization: MemoryShare


Settings = TypeVar("Settings", bound=_Settings)


def trtllm_settings(target: ExportTargetConfig, context_length: int) -> TrtllmSettings:
    """Return the settings of ``trtllm-serve`` for a target that fits."""
    return TrtllmSettings(
        tensor_parallel_size=target.tensor_parallel_size,
        max_seq_len=context_length,
        max_batch_size=target.max_batch_size,
        max_num_tokens=target.max_num_tokens,
        enable_chunked_prefill=True,
        kv_cache_config=TrtllmKvCacheSettings(
            dtype="fp8" if target.quantization == "fp8" else "auto", free_gpu_memory_fraction=KV_CACHE_FRACTION
        ),
    )


def vllm_settings(target: ExportTargetConfig, context_length: int) -> VllmSettings:
    """Return the settings of ``vllm serve`` for a target that fits."""
    return VllmSettings(
        dtype="bfloat16",
        tensor_parallel_size=target.tensor_parallel_size,
        max_model_len=context_length,
        max_num_seqs=target.max_batch_size,
        max_num_batched_tokens=target.max_num_tokens,
        enable_chunked_prefill=True,
        kv_cache_dtype="fp8" if target.quantization == "fp8" else "auto",
        gpu_memory_utilization=KV_CACHE_FRACTION,
    )


def write_settings(path: Path, settings: _Settings, target: ExportTargetConfig, plan: MemoryPlan) -> None:
    """Write a server's YAML file, headed by the sum it was sized by."""
    values = yaml.safe_dump(settings.model_dump(by_alias=True), sort_keys=False)
    text = render("serve.yaml.j2", target=target, plan=plan, reserve_bytes=FIXED_RESERVE_BYTES, values=values)
    write_text_atomically(path, text)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Return a server's YAML file, checked by the server's names and types.

    Raises:
        ExportError: If the server would refuse it.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate(values, by_alias=True, by_name=False)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ExportError(str(path), f"the server would refuse it: {error}.", "Export again.") from error
