"""One micro-batch through the model: packed rows in, exact sums of token losses out.

NeMo's own packed step breaks document boundaries as soon as a row is split over ranks, and passes the longest document
as a tensor, which defeats Megatron's RoPE cache. The functions here are module-level because NeMo keeps them in its
config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_prolong.ops.context_parallel import DocumentPartition

Batch = dict[str, Any]

_DEVICE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def packed_data_step(dataloader_iter: Iterator[Any]) -> Batch:
    """Return the next micro-batch with its tensors on this rank's device.

    The batch is what ``data.dataset.collate_rows`` makes: tokens, labels, loss_mask, position_ids [1, S], cu_seqlens
    int32 [D+1], max_seqlen int, domain list of str, real_tokens int. Where context-parallel ranks share the row, every
    document is split over them: tokens, labels, loss_mask and position_ids are then [1, P / CP], cu_seqlens and
    max_seqlen are those of the padded row of P tokens, and ``partition`` says which tokens are here.
    """
    batch = next(dataloader_iter)
    if isinstance(batch, tuple):
        batch = batch[0]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    batch = {"partition": None, **_over_context_ranks(batch, device)}
    return {key: value.to(device, non_blocking=True) if key in _DEVICE_KEYS else value for key, value in batch.items()}


def _over_context_ranks(batch: Batch, device: torch.device) -> Batch:
    """Return this context-parallel rank's part of a micro-batch; all of it where there is one rank."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    # Sequence parallelism splits what a rank has once more.
    row_multiple = 2 * size * parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    partition = DocumentPartition.of_row(batch["cu_seqlens"], size, rank, row_multiple, device)
    parts = partition.split_row(batch)
    return {
        **batch,
        **parts,
        "cu_seqlens": partition.cu_seqlens,
        "max_seqlen": partition.max_seqlen,
        "partition": partition,
    }


@dataclass
class DocumentSeqParams(PackedSeqParams):
    """Megatron's description of a packed row, and how context-parallel ranks share it."""

    partition: DocumentPartition | None = None


def packed_seq_params(
    cu_seqlens: torch.Tensor, max_seqlen: int, partition: DocumentPartition | None = None
) -> DocumentSeqParams:
    """Return Megatron's description of a packed row.

    Args:
        cu_seqlens: int32 [D+1]; padding belongs to a document, so padded and unpadded boundaries are the same.
        max_seqlen: Longest document; an int, because Megatron caches RoPE tables by its value.
        partition: How context-parallel ranks share the row; None where one rank has all of it.
    """
    return DocumentSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        partition=partition,
    )


def packed_forward_step(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the token losses [1, S] on the last pipeline stage, hidden states elsewhere."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed_seq_params(batch["cu_seqlens"], batch["max_seqlen"], batch["partition"]),
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
