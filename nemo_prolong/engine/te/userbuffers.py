"""Buffers in which Transformer Engine exchanges tensors between TP ranks while a matrix product computes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine.te.fp8 import is_fp8


class UserBuffers(pl.Callback):
    """Allocates the buffers of ``tp_comm_overlap`` before the first step, and frees them after the last.

    NeMo's own callback for it also replaces the overlaps of data-parallel ranks by its defaults.

    Args:
        cfg: The stage. Its rows have one length, see ``config.rules.overlap``.
    """

    def __init__(self, cfg: RunConfig) -> None:
        super().__init__()
        self._cfg = cfg

    def on_fit_start(self, *args: Any) -> None:
        """Allocate; the process groups exist by now."""
        from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

        mode = UserBufferQuantizationMode.FP8 if is_fp8(self._cfg.precision) else UserBufferQuantizationMode.NONE
        initialize_ub(
            shape=[self._cfg.seq_length * self._cfg.train.micro_batch_size, self._cfg.model.hidden_size],
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            quantization_modes=[mode],
            bootstrap_backend="nccl",
        )

    def on_fit_end(self, *args: Any) -> None:
        """Free, so that a second stage in this process can allocate its own."""
        from transformer_engine.pytorch import destroy_ub

        destroy_ub()
