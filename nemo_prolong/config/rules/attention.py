"""What the rules of attention are about: one kind of attention, and the versions and the device that run it.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemo_prolong.config.rules.kernel_shapes import kernel_documents, kernel_tokens
from nemo_prolong.config.schema import AttentionKernels, CpCommType, KernelBackend

Version = tuple[int, ...]
"""A release, such as (2, 9) or (9, 10, 2)."""


@dataclass(frozen=True)
class Platform:
    """Versions and device that a stage runs on.

    Attributes:
        transformer_engine: Installed release, or None.
        compute_capability: Of the GPU, (9, 0) for Hopper; None without a GPU.
        cudnn: Its release; None where it is not known.
        cuda: The release that torch was built with; None where it is not known.
        flash_attn: Installed release of flash-attn 2, or None.
        flash_attn_3: Installed release of flash-attn 3, or None.
    """

    transformer_engine: Version | None = None
    compute_capability: Version | None = None
    cudnn: Version | None = None
    cuda: Version | None = None
    flash_attn: Version | None = None
    flash_attn_3: Version | None = None


ASSUMED_PLATFORM = Platform(transformer_engine=(2, 9), compute_capability=(9, 0), flash_attn=(2, 7, 4))
"""What a configuration is checked for when no device is known: an H100 in the container of this recipe."""


@dataclass(frozen=True)
class Attention:
    """One kind of attention that a stage runs, as kernels see it.

    Attributes:
        compute: Number format of the stage.
        fp8_recipe: Scaling of its FP8 matrix products.
        backend: Whose kernels run, never auto.
        kernels: Which library computes attention for Transformer Engine.
        dtype: Number format of the attention itself.
        layout: thd is a packed row with its document boundaries, bshd a batch of documents of one length.
        cp_comm_type: Exchange between context-parallel ranks, or None at CP 1.
        deterministic: Whether kernels must give the same bits every time.
        num_attention_heads: Query heads of a tensor-parallel rank.
        num_query_groups: Key and value heads of a tensor-parallel rank.
        kv_channels: Dimensions of one head.
        max_seqlen: Tokens of the longest document a row can hold.
        rank_tokens: Tokens of a row that a context-parallel rank has.
        platform: Where it runs.
    """

    compute: str
    fp8_recipe: str
    backend: KernelBackend
    kernels: AttentionKernels
    dtype: Literal["fp32", "bf16", "fp8"]
    layout: Literal["thd", "bshd"]
    cp_comm_type: CpCommType | None
    deterministic: bool
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_seqlen: int
    rank_tokens: int
    platform: Platform

    @property
    def is_te(self) -> bool:
        """Whether Transformer Engine runs it."""
        return self.backend is KernelBackend.TE

    @property
    def is_fp8(self) -> bool:
        """Whether Transformer Engine runs it in FP8."""
        return self.is_te and self.dtype == "fp8"

    @property
    def is_cudnn(self) -> bool:
        """Whether cuDNN computes it."""
        return self.is_te and self.kernels != "flash"

    @property
    def is_flash(self) -> bool:
        """Whether flash-attn computes it."""
        return self.is_te and self.kernels == "flash"

    @property
    def deterministic_workspace_bytes(self) -> int:
        """Least workspace of cuDNN's deterministic backward pass over documents on Hopper.

        cudnn-frontend 1.15, which Transformer Engine 2.9 brings, keeps the gradient of every score: 2 bytes for each
        document slot, head, query and key (``scaled_dot_product_flash_attention.h``). All slots have room for the whole
        row.
        """
        return 2 * kernel_documents(1) * self.num_attention_heads * kernel_tokens(self.rank_tokens) ** 2

    @property
    def architecture(self) -> int | None:
        """Major compute capability: 9 for Hopper, 10 for Blackwell; None without a GPU."""
        return self.platform.compute_capability[0] if self.platform.compute_capability else None

    def te_before(self, *version: int) -> bool:
        """Whether an older Transformer Engine runs it."""
        installed = self.platform.transformer_engine
        return self.is_te and installed is not None and installed < version

    def cudnn_before(self, *version: int) -> bool:
        """Whether a cuDNN computes it that is known to be older."""
        return self.is_cudnn and self.platform.cudnn is not None and self.platform.cudnn < version


def dotted(version: Version | None) -> str:
    """Return a release as it is written; a question mark where it is not known."""
    return ".".join(map(str, version)) if version else "?"
