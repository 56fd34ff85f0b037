"""One micro-batch through the model: packed rows in, exact sums of token losses out.

NeMo's own packed step breaks document boundaries as soon as a row is split over ranks, and passes the longest document
as a tensor, which defeats Megatron's RoPE cache. The functions here are module-level because NeMo keeps them in its
config.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

Batch = dict[str, Any]

_DEVICE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def packed_data_step(dataloader_iter: Iterator[Any]) -> Batch:
    """Return the next micro-batch with its tensors on this rank's device.

    The batch is what ``data.dataset.collate_rows`` makes: tokens, labels, loss_mask, position_ids [1, S], cu_seqlens
    int32 [D+1], max_seqlen int, domain list of str, real_tokens int. Context parallelism will split it by document
    here.
    """
    batch = next(dataloader_iter)
    if isinstance(batch, tuple):
        batch = batch[0]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {key: value.to(device, non_blocking=True) if key in _DEVICE_KEYS else value for key, value in batch.items()}


def packed_seq_params(cu_seqlens: torch.Tensor, max_seqlen: int) -> PackedSeqParams:
    """Return Megatron's description of a packed row.

    Args:
        cu_seqlens: int32 [D+1]; padding belongs to a document, so padded and unpadded boundaries are the same.
        max_seqlen: Longest document; an int, because Megatron caches RoPE tables by its value.
    """
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def packed_forward_step(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the token losses [1, S] on the last pipeline stage, hidden states elsewhere."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch["cu_seqlens"], batch["max_seqlen"]),
    )


class ExactLossReduction(MaskedTokenLossReduction):
    """Sums token losses; Megatron divides once, by the target tokens of the whole global batch.

    That division happens in ``finalize_model_grads`` because ``calculate_per_token_loss`` is on. A micro-batch without
    target tokens contributes zero.
    """

    def forward(
        self, batch: Batch, forward_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return (loss sum to differentiate, target tokens int32, {loss_sum_and_ub_size: float64 [2]})."""
        loss_mask = batch["loss_mask"].flatten()
        # Where the mask is zero the loss is dropped, not multiplied: 0 * inf would be NaN.
        losses = torch.where(loss_mask > 0, forward_out.flatten().float() * loss_mask, 0.0)
        target_tokens = loss_mask.sum()
        report = torch.stack([losses.detach().double().sum(), target_tokens.double()])
        return losses.sum(), target_tokens.to(torch.int), {"loss_sum_and_ub_size": report}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Return the mean loss of the global batch, float32: what pipeline stages without a loss expect to receive."""
        return super().reduce(losses_reduced_per_micro_batch).float()
