"""Transformer Engine's choice of a kernel, and what stands in for it on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from benchmarks.hopper.bench import Bench
from benchmarks.hopper.rows import micro_batch
from nemo_prolong.config.schema import PrecisionConfig, RecomputeConfig

_STAND_IN = "torch stands in for Transformer Engine on a CPU"
_SWITCHES = {"cudnn": "NVTE_FUSED_ATTN", "flash": "NVTE_FLASH_ATTN", "unfused": "NVTE_UNFUSED_ATTN"}


def te_precision(bench: Bench, compute: str = "bf16", recompute: RecomputeConfig | None = None) -> PrecisionConfig:
    """Return a precision of the Transformer Engine backend; on a CPU the torch backend in bf16."""
    recompute = recompute or RecomputeConfig()
    if not bench.full:
        return PrecisionConfig(compute="bf16", backend="torch", recompute=recompute)
    return PrecisionConfig(compute=compute, backend="te", recompute=recompute)


def kernel_of_last_call(bench: Bench) -> str:
    """Return the kernel that Transformer Engine took for the attention before."""
    if not bench.full:
        return _STAND_IN
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

    if chosen["use_flash_attention"]:
        return f"flash-attn {chosen['flash_attention_backend']}"
    if chosen["use_fused_attention"]:
        return f"cuDNN, sub-backend {int(chosen['fused_attention_backend'])}"
    return "no fused kernel"


@contextlib.contextmanager
def only_kernel(bench: Bench, kernel: Literal["cudnn", "flash"]) -> Iterator[None]:
    """Leave Transformer Engine one kind of kernel to choose.

    It reads the switches when a kind of attention is new to it, and is made to read them again here.
    """
    before = {name: os.environ.get(name) for name in _SWITCHES.values()}
    os.environ.update({name: str(int(kind == kernel)) for kind, name in _SWITCHES.items()})
    _choose_again(bench)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        _choose_again(bench)


def _choose_again(bench: Bench) -> None:
    if bench.full:
        from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

        chosen["backend_selection_requires_update"] = True


def packed_call(
    attention: torch.nn.Module, lengths: Sequence[int]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function of query, key and value that calls the attention of a layer as a training step does."""
    from nemo_prolong.engine.training.packed_step import packed_forward_step

    batch = attention.config.data_step_fn(iter([micro_batch(lengths, vocab_size=2)]))
    params = packed_forward_step(lambda **inputs: inputs["packed_seq_params"], batch)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, None, packed_seq_params=params).view_as(query)

    return call
