"""One micro-batch through the model: packed rows in, exact sums of token losses out.

NeMo's own packed step breaks document boundaries as soon as a row is split over ranks, and passes the longest document
as a tensor, which defeats Megatron's RoPE cache. The functions here are module-level because NeMo keeps them in its
config.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_prolong.ops.context_parallel import DocumentPartition
from nemo_prolong.ops.linear_cross_entropy import HeadLoss
from nemo_prolong.ops.token_loss import LossSums, loss_sums, position_buckets
from nemo_prolong.telemetry.positions import position_starts, starts_on

Batch = dict[str, Any]

_DEVICE_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")


def packed_data_step(dataloader_iter: Iterator[Any], tile_tokens: int = 1) -> Batch:
    """Return the next micro-batch with its tensors on this rank's device.

    The batch is what ``data.dataset.collate_rows`` makes: tokens, labels, loss_mask, position_ids [1, S], cu_seqlens
    int32 [D+1], max_seqlen int, domain list of str, real_tokens int. Where context-parallel ranks share the row, every
    document is split over them: tokens, labels, loss_mask and position_ids are then [1, P / CP], cu_seqlens and
    max_seqlen are those of the padded row of P tokens, and ``partition`` says which tokens are here. ``max_seqlen``
    comes out as the next power of two, see ``bucket_of``. ``equal_documents`` is new, see ``DocumentSeqParams``, and so
    is what telemetry wants to know: ``row_tokens`` (S), ``squared_tokens`` (sum over the documents of the square of
    their tokens) and ``data_wait_seconds``.

    Args:
        dataloader_iter: Micro-batches.
        tile_tokens: Where ranks share the row, it is padded so that each rank's part comes in multiples of twice this.
    """
    started = time.perf_counter()
    batch = next(dataloader_iter)
    waited = time.perf_counter() - started
    if isinstance(batch, tuple):
        batch = batch[0]
    batch = {**batch, **_sizes(batch), "data_wait_seconds": waited}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    batch = {"partition": None, **_over_context_ranks(batch, device, tile_tokens)}
    partition = batch["partition"]
    # On the host, before the boundaries move to the device: looking at them there would make the host wait.
    boundaries = batch["cu_seqlens"].numpy() if partition is None else partition.padded_boundaries
    batch["equal_documents"] = equal_documents(boundaries)
    batch["max_seqlen"] = bucket_of(batch["max_seqlen"])
    return {key: value.to(device, non_blocking=True) if key in _DEVICE_KEYS else value for key, value in batch.items()}


def _sizes(batch: Batch) -> dict[str, int]:
    """Return the tokens of the whole row and the sum of the squares of its documents' tokens, padding left out."""
    lengths = np.diff(batch["cu_seqlens"].numpy()).astype(np.int64)
    row_tokens = batch["tokens"].shape[1]
    documents = lengths[:-1] if batch["real_tokens"] < row_tokens else lengths
    return {"row_tokens": row_tokens, "squared_tokens": int((documents**2).sum())}


def bucket_of(max_seqlen: int) -> int:
    """Return the next power of two: the bound that kernels and tables see instead of the longest document.

    Every new value costs a table of RoPE angles (256 MiB at 512K), and under Transformer Engine the plan of a cuDNN
    kernel. There are as many powers of two as doublings of the row, and all their tables together are two of the last.

    >>> bucket_of(1), bucket_of(33_000), bucket_of(65_536)
    (1, 65536, 65536)
    """
    return 1 << (max_seqlen - 1).bit_length()


def equal_documents(boundaries: np.ndarray[Any, Any]) -> int | None:
    """Return the number of documents if all have one length, else None.

    Args:
        boundaries: Document boundaries of the row, int [D+1].

    >>> equal_documents(np.array([0, 4, 8])), equal_documents(np.array([0, 4, 9]))
    (2, None)
    """
    lengths = np.diff(boundaries)
    return len(lengths) if (lengths == lengths[0]).all() else None


def _over_context_ranks(batch: Batch, device: torch.device, tile_tokens: int) -> Batch:
    """Return this context-parallel rank's part of a micro-batch; all of it where there is one rank."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    # Sequence parallelism splits what a rank has once more.
    row_multiple = 2 * tile_tokens * size * parallel_state.get_tensor_model_parallel_world_size()
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
    cu_seqlens: torch.Tensor | None = None
    """int32 [D+1]; where Megatron's own copies are withheld, these are the boundaries."""
    equal_documents: int | None = None
    """Number of documents if all have one length, padding counted, so that the row is a batch too; else None."""


def packed_seq_params(
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    partition: DocumentPartition | None = None,
    equal_documents: int | None = None,
) -> DocumentSeqParams:
    """Return Megatron's description of a packed row.

    Args:
        cu_seqlens: int32 [D+1]; padding belongs to a document, so padded and unpadded boundaries are the same.
        max_seqlen: Longest document; an int, because Megatron caches RoPE tables by its value.
        partition: How context-parallel ranks share the row; None where one rank has all of it.
        equal_documents: Number of documents if all have one length, else None.
    """
    return DocumentSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        cu_seqlens=cu_seqlens,
        partition=partition,
        equal_documents=equal_documents,
    )


def packed_forward_step(model: torch.nn.Module, batch: Batch) -> HeadLoss | torch.Tensor:
    """Return the losses on the last pipeline stage, hidden states elsewhere."""
    return model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_seq_params(
            batch["cu_seqlens"], batch["max_seqlen"], batch["partition"], batch["equal_documents"]
        ),
    )


def _loss_by_position(batch: Batch, token_losses: torch.Tensor) -> LossSums:
    """Return the losses [G] of this rank's tokens by the position that each predicts."""
    row_tokens = batch["row_tokens"]
    predicted = batch["position_ids"].flatten() + 1
    groups = position_buckets(predicted, starts_on(predicted.device, row_tokens))
    return loss_sums(token_losses, batch["loss_mask"].flatten(), groups, len(position_starts(row_tokens)))


class ExactLossReduction(MaskedTokenLossReduction):
    """Sums token losses; Megatron divides once, by the target tokens of the whole global batch.

    That division happens in ``finalize_model_grads`` because ``calculate_per_token_loss`` is on. A micro-batch without
    target tokens contributes zero.

    Args:
        per_device: Average over the micro-batches of each rank instead, each of which counts the mean of its own target
            tokens: ProLong's average in both stages before SFT (``training/trainer.py``, without
            ``token_scaled_loss``), for ablation. What is reported stays the mean over target tokens.
        validation_step: As NeMo has it.
    """

    def __init__(self, *, per_device: bool = False, validation_step: bool = False) -> None:
        super().__init__(validation_step=validation_step)
        self.per_device = per_device

    def forward(self, batch: Batch, forward_out: HeadLoss) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return (loss to differentiate, what Megatron divides the sum of all by, int32, report).

        The report holds ``loss_sum_and_ub_size``, float64 [2]: sum of token losses, target tokens; and what it is made
        of: ``loss_by_position``, the ``LossSums`` of each bucket of positions of the predicted tokens, and ``domain``.
        """
        # Not by name: mixed precision makes a plain tuple of it.
        loss_sum, token_losses = forward_out
        loss_mask = batch["loss_mask"].flatten().double()
        target_tokens = loss_mask.sum()
        report = {
            "loss_sum_and_ub_size": torch.stack([(token_losses.double() * loss_mask).sum(), target_tokens]),
            "loss_by_position": _loss_by_position(batch, token_losses),
            "domain": batch["domain"][0],
        }
        if self.per_device:
            has_targets = (target_tokens > 0).to(torch.int)
            return loss_sum / target_tokens.clamp(min=1).float(), has_targets, report
        return loss_sum, target_tokens.to(torch.int), report

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Any]]) -> torch.Tensor:
        """Return the mean loss of the global batch, float32: what pipeline stages without a loss expect to receive.

        NeMo's own leaves out micro-batches without targets, and a rank with none but those then sends another dtype
        than the rest.
        """
        if not losses_reduced_per_micro_batch:
            return torch.tensor(0.0, device=torch.cuda.current_device())
        sums = torch.stack([part["loss_sum_and_ub_size"] for part in losses_reduced_per_micro_batch]).sum(dim=0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return (sums[0] / sums[1].clamp(min=1)).float()
