"""What the engine is told for overlaps, fused gradients and recomputation; imports NeMo, without Transformer Engine."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed import HashStore

from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Platform
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.engine.model import nemo_model
from nemo_prolong.engine.te.userbuffers import UserBuffers
from nemo_prolong.engine.training import recompute
from nemo_prolong.engine.training.trainer import build_strategy
from nemo_prolong.errors import ConfigError


def found(stages: dict[str, RunConfig]) -> dict[str, Any]:
    """Return all of it, for stages by name."""
    return {
        "exchange": {name: exchange(cfg) for name, cfg in stages.items()},
        "fusion": {
            f"{backend.value} {asked}": fusion(stages["default"], backend, asked)
            for backend in (KernelBackend.TE, KernelBackend.TORCH)
            for asked in (None, True, False)
        },
        "tp_comm_overlap": [model_config(stages[name]).tp_comm_overlap for name in ("default", "userbuffers")],
        "userbuffers": [buffers_of(stages[name]) for name in ("userbuffers", "userbuffers_fp8")],
        "recompute": [
            recomputed(stages["auto"], ASSUMED_PLATFORM, 80_000_000_000),
            recomputed(stages["auto"], ASSUMED_PLATFORM, 4_400_000_000),
            recomputed(stages["auto"], Platform(), 0),
            recomputed(stages["default"], ASSUMED_PLATFORM, 80_000_000_000),
        ],
    }


def exchange(cfg: RunConfig) -> dict[str, Any]:
    """Return how gradients and weights travel."""
    ddp = build_strategy(cfg, HashStore()).ddp_config
    names = ("overlap_grad_reduce", "overlap_param_gather", "align_param_gather", "bucket_size")
    return {name: getattr(ddp, name) for name in names}


def model_config(cfg: RunConfig) -> Any:
    """Return NeMo's configuration of a stage's model."""
    return nemo_model.build_nemo_config(cfg.model, cfg.seq_length, cfg.parallelism, cfg.precision)


def fusion(cfg: RunConfig, backend: KernelBackend, asked: bool | None) -> bool | str:
    """Return whether gradients are accumulated by the products that make them, or the refusal."""
    changes = {"compute": "bf16", "backend": backend, "gradient_accumulation_fusion": asked}
    precision = cfg.precision.model_copy(update=changes)
    try:
        return bool(model_config(cfg.model_copy(update={"precision": precision})).gradient_accumulation_fusion)
    except ConfigError as error:
        return str(error)


def buffers_of(cfg: RunConfig) -> dict[str, Any]:
    """Return what Transformer Engine is asked to allocate, and whether it is freed."""
    seen: dict[str, Any] = {}
    te = ModuleType("transformer_engine.pytorch")
    te.__dict__.update(
        UserBufferQuantizationMode=SimpleNamespace(NONE="none", FP8="fp8"),
        initialize_ub=lambda **arguments: seen.update(arguments),
        destroy_ub=lambda: seen.update(freed=True),
    )
    sys.modules["transformer_engine.pytorch"] = te
    size, parallel_state.get_tensor_model_parallel_world_size = (
        parallel_state.get_tensor_model_parallel_world_size,
        lambda: cfg.parallelism.tensor_model_parallel_size,
    )
    buffers = UserBuffers(cfg)
    buffers.on_fit_start()
    buffers.on_fit_end()
    parallel_state.get_tensor_model_parallel_world_size = size
    del sys.modules["transformer_engine.pytorch"]
    return seen


def recomputed(cfg: RunConfig, platform: Platform, device_bytes: int) -> list[Any]:
    """Return the recomputation of a stage on some platform, and what was said with which level."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    recompute.log.addHandler(handler)
    recompute.log.setLevel(logging.INFO)
    platform_here, properties = recompute.current_platform, torch.cuda.get_device_properties
    recompute.current_platform = lambda: platform
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=device_bytes)
    chosen = recompute.with_recompute(cfg, HashStore())
    recompute.current_platform, torch.cuda.get_device_properties = platform_here, properties
    recompute.log.removeHandler(handler)
    return [chosen.precision.recompute.model_dump(), said]
