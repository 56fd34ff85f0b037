"""Does a model with its whole advertised context fit on the GPUs that are to serve it?

Weights, activations of one step and a fixed reserve are taken from the memory of a GPU. What is left must hold the keys
and values of ``max_batch_size`` requests of the advertised length. A server that is started with less refuses long
requests at run time, after it has answered short ones. So it is refused here. Needs no torch.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemo_prolong.config.schema import ExportTargetConfig, ModelConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.plan.model_size import model_size
from nemo_prolong.units import format_bytes, format_tokens

_MIB = 2**20

GPU_MEMORY_BYTES = {
    "h100_80gb": 81559 * _MIB,
    "h200_141gb": 143771 * _MIB,
    "b200_180gb": 183359 * _MIB,
    "a100_80gb": 81920 * _MIB,
    "l40s_48gb": 46068 * _MIB,
}
"""Memory by device, as the driver reports it (the names are those of the data sheets)."""

_WITHOUT_FP8 = {"a100_80gb"}

FIXED_RESERVE_BYTES = 4 * 2**30
"""CUDA context, NCCL buffers, kernels' workspaces and CUDA graphs of one process."""

KV_CACHE_FRACTION = 0.9
"""Share that the server takes: of what weights and activations leave (TensorRT-LLM), or of all memory (vLLM)."""

KV_BLOCK_TOKENS = 64
"""Keys and values are kept in blocks; the largest default of either server."""

_MAX_TENSOR_PARALLEL_SIZE = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU.

    Attributes:
        gpu_bytes: All of it.
        weights_bytes: Weights of this rank.
        activation_bytes: Activations of ``max_num_tokens`` tokens and the logits of a batch.
        kv_bytes_per_token: Keys and values of one token in all layers of this rank.
        kv_needed_bytes: Keys and values of ``max_batch_size`` requests of the advertised length.
        kv_available_bytes: What the server will set aside for them.
    """

    gpu_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    kv_needed_bytes: int
    kv_available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether every request can have its whole length."""
        return self.kv_needed_bytes <= self.kv_available_bytes

    def describe(self) -> str:
        """Return the sum in one line."""
        return (
            f"weights {format_bytes(self.weights_bytes)}, activations {format_bytes(self.activation_bytes)}, reserve "
            f"{format_bytes(FIXED_RESERVE_BYTES)}, keys and values {format_bytes(self.kv_needed_bytes)} of "
            f"{format_bytes(max(self.kv_available_bytes, 0))} left, of {format_bytes(self.gpu_bytes)}"
        )


def plan_memory(model: ModelConfig, context_length: int, target: ExportTargetConfig) -> MemoryPlan:
    """Return where the memory of one GPU goes.

    Args:
        model: The model.
        context_length: Advertised tokens of a request, prompt and answer.
        target: What serves it.

    Raises:
        ExportError: If the device is unknown or has no FP8, or the layers cannot be shared by so many GPUs.
    """
    _check_device(target)
    _check_layout(model, target)
    gpu_bytes, ranks = GPU_MEMORY_BYTES[target.gpu], target.tensor_parallel_size
    weights = _weights_bytes(model, target) // ranks
    activations = _activation_bytes(model, target)
    kv_per_token = 2 * model.num_layers * model.num_query_groups * model.kv_channels * _kv_value_bytes(target) // ranks
    blocks = -(-context_length // KV_BLOCK_TOKENS)
    if target.format == "vllm":
        available = int(gpu_bytes * KV_CACHE_FRACTION) - weights - activations - FIXED_RESERVE_BYTES
    else:
        available = int((gpu_bytes - weights - activations - FIXED_RESERVE_BYTES) * KV_CACHE_FRACTION)
    return MemoryPlan(
        gpu_bytes=gpu_bytes,
        weights_bytes=weights,
        activation_bytes=activations,
        kv_bytes_per_token=kv_per_token,
        kv_needed_bytes=target.max_batch_size * blocks * KV_BLOCK_TOKENS * kv_per_token,
        kv_available_bytes=available,
    )


def check_memory(model: ModelConfig, context_length: int, target: ExportTargetConfig) -> MemoryPlan:
    """Return the plan of settings that fit.

    Raises:
        ExportError: If they do not, naming the nearest ones that do. Also as ``plan_memory``.
    """
    plan = plan_memory(model, context_length, target)
    if plan.fits:
        return plan
    remedies = list(dict.fromkeys(_settings_that_fit(model, context_length, target)))
    raise ExportError(
        f"export.gpu={target.gpu} export.tensor_parallel_size={target.tensor_parallel_size}",
        f"{target.max_batch_size} x {format_tokens(context_length)} tokens do not fit: {plan.describe()}.",
        f"Set {', or '.join(remedies)}." if remedies else "No device of the table holds this model.",
    )


def _check_device(target: ExportTargetConfig) -> None:
    what = f"export.gpu={target.gpu}"
    if target.gpu not in GPU_MEMORY_BYTES:
        known = ", ".join(GPU_MEMORY_BYTES)
        raise ExportError(what, f"known devices are {known}.", "Set export.gpu=h100_80gb, or the one you have.")
    if target.quantization == "fp8" and target.gpu in _WITHOUT_FP8:
        raise ExportError(what, "it has no FP8.", "Set export.quantization=null, or export.gpu=h100_80gb.")


def _check_layout(model: ModelConfig, target: ExportTargetConfig) -> None:
    """Refuse ranks that would have to share a key-value head, of which every one would keep a copy."""
    ranks, groups = target.tensor_parallel_size, model.num_query_groups
    if groups % ranks:
        nearest = max(divisor for divisor in range(1, min(ranks, groups) + 1) if groups % divisor == 0)
        raise ExportError(
            f"export.tensor_parallel_size={ranks}",
            f"must divide the {groups} key-value heads.",
            f"Set export.tensor_parallel_size={nearest}.",
        )


def _kv_value_bytes(target: ExportTargetConfig) -> int:
    return 1 if target.quantization == "fp8" else 2


def _weights_bytes(model: ModelConfig, target: ExportTargetConfig) -> int:
    """Return the bytes of all weights: in FP8 the matrices of the layers, in bf16 the rest."""
    size = model_size(model)
    in_layers = size.attention + size.mlp
    return in_layers * (1 if target.quantization == "fp8" else 2) + (size.total - in_layers) * 2


def _activation_bytes(model: ModelConfig, target: ExportTargetConfig) -> int:
    """Return the most that is alive in one layer, in bf16, and the fp32 logits of one position per request.

    Four tensors of the hidden size (residual, norm, input and output of a block) are on every rank. Queries, keys,
    values, gate, up and their product are shared out.
    """
    ranks = target.tensor_parallel_size
    heads = model.num_attention_heads + 2 * model.num_query_groups
    per_token = 4 * model.hidden_size + (heads * model.kv_channels + 3 * model.ffn_hidden_size) // ranks
    return target.max_num_tokens * per_token * 2 + target.max_batch_size * model.vocab_size * 4


def _settings_that_fit(model: ModelConfig, context_length: int, target: ExportTargetConfig) -> Iterator[str]:
    """Yield what fits, each changing one setting as little as possible; several of them only where no one does."""
    wider: list[dict[str, object]] = [
        {"tensor_parallel_size": size}
        for size in range(target.tensor_parallel_size + 1, _MAX_TENSOR_PARALLEL_SIZE + 1)
        if model.num_query_groups % size == 0
    ]
    has_fp8 = target.gpu not in _WITHOUT_FP8
    quantized: list[dict[str, object]] = [{"quantization": "fp8"}] if target.quantization is None and has_fp8 else []
    larger: list[dict[str, object]] = [
        {"gpu": gpu}
        for gpu in sorted(GPU_MEMORY_BYTES, key=GPU_MEMORY_BYTES.__getitem__)
        if GPU_MEMORY_BYTES[gpu] > GPU_MEMORY_BYTES[target.gpu]
        and not (target.quantization == "fp8" and gpu in _WITHOUT_FP8)
    ]
    fewer: list[dict[str, object]] = [{"max_batch_size": size} for size in range(target.max_batch_size - 1, 0, -1)]
    kinds = (wider, quantized, larger, fewer)
    single = [_first_that_fits(model, context_length, target, changes) for changes in kinds]
    yield from filter(None, single)
    if not any(single):
        together = itertools.product(*([{}, *changes] for changes in (quantized, larger, wider, fewer)))
        several = (functools.reduce(operator.or_, changes) for changes in together)
        yield from filter(None, [_first_that_fits(model, context_length, target, several)])


def _first_that_fits(
    model: ModelConfig, context_length: int, target: ExportTargetConfig, changes: Iterable[dict[str, object]]
) -> str | None:
    for change in changes:
        if not (change.get("quantization") == "fp8" and change.get("gpu") in _WITHOUT_FP8):
            if plan_memory(model, context_length, target.model_copy(update=change)).fits:
                return " ".join(f"export.{key}={value}" for key, value in change.items())
    return None
