"""How a model is laid out over ranks, in which number formats and with which kernels."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from nemo_prolong.config.schema.base import Parts, Section

CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
"""How context-parallel ranks exchange keys and values, in Megatron's words."""


AttentionKernels = Literal["auto", "cudnn", "flash"]
"""Which library computes attention for Transformer Engine."""


class KernelBackend(StrEnum):
    """Which implementation of the layers runs: ours in plain torch, or Transformer Engine."""

    AUTO = "auto"
    TORCH = "torch"
    TE = "te"


class ParallelismConfig(Section):
    """How a model is laid out over ranks; data parallel takes what is left of the world size."""

    tensor_model_parallel_size: Parts = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: Parts = 1
    """Ranks that share the layers (PP)."""
    context_parallel_size: Parts = 1
    """Ranks that share each row's tokens (CP)."""
    sequence_parallel: bool = False
    """Split norm and dropout activations over the TP ranks; needs TP > 1."""
    cp_comm_type: CpCommType = "p2p"
    """Exchange between CP ranks. Transformer Engine 2.9 masks documents with p2p only."""
    hierarchical_context_parallel_sizes: list[Parts] | None = None
    """With a2a+p2p: ranks that exchange heads, and ranks of the ring around them; their product is CP."""
    num_nodes: Parts = 1
    """Machines the stage is planned for."""
    ranks_per_node: Parts = 1
    """GPUs (or CPU processes) per machine it is planned for."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def planned_world_size(self) -> int:
        """Ranks the stage is planned for."""
        return self.num_nodes * self.ranks_per_node


class RecomputeConfig(Section):
    """What is computed again in the backward pass instead of kept."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full computes whole layers again, selective the modules of recompute_modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: every block of layers, or only the first ones of each pipeline stage."""
    recompute_num_layers: Parts | None = None
    """With full: layers per block."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp"]] | None = None
    """With selective: parts of every layer to compute again. Only mlp saves something here."""
    distribute_saved_activations: bool = False
    """With full: keep the input of a block split over the TP ranks; sequence parallel already does."""


class OffloadConfig(Section):
    """What is moved to the host's memory between forward and backward pass; needs Transformer Engine."""

    cpu_offloading: bool = False
    """Move the activations that the first layers keep; not with recomputation, nor with PP > 1."""
    cpu_offloading_num_layers: Annotated[int, Field(ge=0, le=2**20)] = 0
    """Layers whose activations are moved: at least 1, and fewer than the model has."""


class PrecisionConfig(Section):
    """Number formats and kernels."""

    compute: Literal["fp32", "bf16", "fp8", "fp8_attention"]
    """Number format; fp8 is FP8 matrix products and BF16 attention."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Scaling of FP8 matrix products; mxfp8 is not here because it needs Blackwell."""
    backend: KernelBackend = KernelBackend.AUTO
    """auto takes Transformer Engine on a GPU and torch on a CPU. FP32 takes torch. None is replaced by another."""
    attention: AttentionKernels = "auto"
    """Kernels of Transformer Engine's attention. auto is its own choice, which is cuDNN on Hopper and Blackwell. flash
    is flash-attn, whose deterministic backward pass needs memory that is linear in the tokens."""
    recompute: RecomputeConfig = RecomputeConfig()
    offload: OffloadConfig = OffloadConfig()
