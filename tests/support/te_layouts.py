"""Ranks of any layout in one process, and models on them: torch's fake process group exchanges nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_prolong.config.schema import KernelBackend, ModelConfig, ParallelismConfig, PrecisionConfig

TINY = ModelConfig(
    name="tiny",
    nemo_config="LlamaConfig",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=128,
    vocab_size=500,
    rotary_base=1e4,
)


def enter(parallelism: ParallelismConfig, rank: int, world_size: int) -> None:
    """Be one rank of a world that does not exist; a world of one rank does."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    leave()
    backend, store = ("gloo", dist.HashStore()) if world_size == 1 else ("fake", FakeStore())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallelism.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallelism.pipeline_model_parallel_size,
        context_parallel_size=parallelism.context_parallel_size,
        hierarchical_context_parallel_sizes=parallelism.hierarchical_context_parallel_sizes,
        create_gloo_process_groups=False,
    )
    get_cuda_rng_tracker().set_states({"model-parallel-rng": torch.get_rng_state()})


def leave() -> None:
    """Forget the world."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build(
    model: ModelConfig,
    seq_length: int,
    parallelism: ParallelismConfig,
    precision: PrecisionConfig,
    device: str = "meta",
) -> torch.nn.Module:
    """Return the model of this rank.

    Args:
        model: Its architecture.
        seq_length: Tokens in a row.
        parallelism: The layout that ``enter`` was given.
        precision: Names the backend too.
        device: ``meta`` for no storage, ``cpu`` for storage that is not initialised.
    """
    from nemo_prolong.engine.model.nemo_model import build_nemo_config

    config = build_nemo_config(model, seq_length, parallelism, precision)
    # Of the strategy, when it connects to the model.
    config.tensor_model_parallel_size = parallelism.tensor_model_parallel_size
    config.context_parallel_size = parallelism.context_parallel_size
    config.sequence_parallel = parallelism.sequence_parallel
    config.init_model_with_meta_device = True
    config.use_cpu_initialization = False
    with _MetaForCuda():
        module = config.configure_model(tokenizer=None)
    if precision.compute != "fp32":
        # Of NeMo's precision plugin.
        module.bfloat16()
    return module if device == "meta" else module.to_empty(device=device)


class _MetaForCuda(TorchFunctionMode):
    """Make tensors without storage wherever Megatron names a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def te(compute: str = "bf16", fp8_recipe: str = "tensorwise") -> PrecisionConfig:
    """Return a precision of the Transformer Engine backend."""
    return PrecisionConfig(compute=compute, fp8_recipe=fp8_recipe, backend=KernelBackend.TE)


def plain(compute: str = "bf16") -> PrecisionConfig:
    """Return a precision of the torch backend."""
    return PrecisionConfig(compute=compute, backend=KernelBackend.TORCH)


def sharded(module: torch.nn.Module) -> dict[str, Any]:
    """Return what a distributed checkpoint of the model holds: key -> global shape, offset and dtype of every part."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

    found: dict[str, list[Any]] = {}
    for part in module.sharded_state_dict().values():
        pieces = [part]
        if isinstance(part, ShardedTensorFactory):
            pieces = list(part.build().values()) if isinstance(part.build(), dict) else list(part.build())
        for piece in pieces:
            assert isinstance(piece, ShardedTensor | ShardedObject), piece
            dtype = str(piece.dtype) if isinstance(piece, ShardedTensor) else "object"
            found.setdefault(piece.key, []).append((tuple(piece.global_shape), tuple(piece.global_offset), dtype))
    return {key: sorted(parts) for key, parts in found.items()}
