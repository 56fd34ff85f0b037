"""One micro-batch through the model: packed rows in, exact sums of token losses out.

NeMo's own packed step breaks document boundaries as soon as a row is split over ranks, and passes the longest document
as a tensor, which defeats Megatron's RoPE cache. The functions here are module-level because NeMo keeps them in its
config.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_prolong.data.batch import PackedBatch, RankBatch
from nemo_prolong.data.loading import next_batch
from nemo_prolong.ops.context_parallel import DocumentPartition, with_empty_documents
from nemo_prolong.ops.linear_cross_entropy import HeadLoss
from nemo_prolong.ops.token_loss import LossSums, loss_sums, position_buckets
from nemo_prolong.ops.transfer import to_device
from nemo_prolong.telemetry.positions import position_starts, starts_on


def packed_data_step(dataloader_iter: Iterator[Any], tile_tokens: int = 1, *, few_shapes: bool = False) -> RankBatch:
    """Return this rank's part of the next micro-batch, on its device.

    Where context-parallel ranks share the row, every document is split over them.

    Args:
        dataloader_iter: Gives a ``PackedBatch``, or, as Lightning's does, a tuple that begins with one.
        tile_tokens: Where ranks share the row, it is padded so that each rank's part comes in multiples of twice this.
        few_shapes: Add empty documents, and padding where ranks share the row, so that kernels see few shapes. No loss
            changes by a bit.

    Raises:
        DataError: If the row could not be read, in a loader process or here.
    """
    started = time.perf_counter()
    whole = next_batch(dataloader_iter)
    waited = time.perf_counter() - started
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    partition = _partition(whole, device, tile_tokens, few_shapes)
    if partition is not None:
        here = _part_of(whole, partition)
    else:
        here = _with_empty_documents(whole) if few_shapes else whole
    # On the host, before the boundaries move to the device: looking at them there would make the host wait.
    boundaries = whole.cu_seqlens.numpy() if partition is None else partition.padded_boundaries
    return RankBatch(
        tokens=to_device(here.tokens, device),
        labels=to_device(here.labels, device),
        loss_mask=to_device(here.loss_mask, device),
        position_ids=to_device(here.position_ids, device),
        cu_seqlens=to_device(here.cu_seqlens, device),
        max_seqlen=bucket_of(here.max_seqlen),
        partition=partition,
        equal_documents=equal_documents(boundaries),
        domain=whole.domain,
        row_tokens=whole.tokens.shape[1],
        real_tokens=whole.real_tokens,
        squared_tokens=_squared_tokens(whole),
        data_wait_seconds=waited,
    )


def _squared_tokens(batch: PackedBatch) -> int:
    """Return the sum of the squares of the documents' tokens; the last document of a short row is its padding."""
    lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.int64)
    documents = lengths[:-1] if batch.real_tokens < batch.tokens.shape[1] else lengths
    return int((documents**2).sum())


def bucket_of(max_seqlen: int) -> int:
    """Return the next power of two: the bound that tables and kernels see instead of the longest document.

    Every new value costs a table of RoPE angles, 256 MiB at 512K. There are as many powers of two as doublings of the
    row, and all their tables together are two of the last. The graphs of cuDNN's kernels do not depend on it.

    >>> bucket_of(1), bucket_of(33_000), bucket_of(65_536)
    (1, 65536, 65536)
    """
    return 1 << (max_seqlen - 1).bit_length()


def equal_documents(boundaries: np.ndarray[Any, Any]) -> int | None:
    """Return the number of documents if all have one length, else None. Empty ones do not count.

    Args:
        boundaries: Document boundaries of the row, int [D+1].

    >>> equal_documents(np.array([0, 4, 8, 8])), equal_documents(np.array([0, 4, 9]))
    (2, None)
    """
    lengths = np.diff(boundaries)
    lengths = lengths[lengths > 0]
    return len(lengths) if (lengths == lengths[0]).all() else None


def _with_empty_documents(batch: PackedBatch) -> PackedBatch:
    return replace(batch, cu_seqlens=torch.from_numpy(with_empty_documents(batch.cu_seqlens.numpy())))


def _partition(
    batch: PackedBatch, device: torch.device, tile_tokens: int, few_shapes: bool
) -> DocumentPartition | None:
    """Return how context-parallel ranks share the row; None where there is one rank."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    # Sequence parallelism splits what a rank has once more.
    row_multiple = 2 * tile_tokens * size * parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    if not few_shapes:
        return DocumentPartition.of_row(batch.cu_seqlens, size, rank, row_multiple, device)
    row_tokens = batch.tokens.shape[1]
    # The padding of a short row makes room for that of its documents.
    documents = batch.cu_seqlens[:-1] if batch.real_tokens < row_tokens else batch.cu_seqlens
    return DocumentPartition.of_row(documents, size, rank, row_multiple, device, row_tokens)


def _part_of(batch: PackedBatch, partition: DocumentPartition) -> PackedBatch:
    """Return this rank's tokens [1, T] of a micro-batch, with the boundaries of the padded row."""
    return replace(
        batch,
        tokens=partition.split(batch.tokens),
        labels=partition.split(batch.labels),
        loss_mask=partition.split(batch.loss_mask),
        position_ids=partition.split_positions(batch.position_ids),
        cu_seqlens=partition.cu_seqlens,
        max_seqlen=partition.max_seqlen,
    )


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


def packed_forward_step(model: torch.nn.Module, batch: RankBatch) -> HeadLoss | torch.Tensor:
    """Return the losses on the last pipeline stage, hidden states elsewhere."""
    return model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=packed_seq_params(batch.cu_seqlens, batch.max_seqlen, batch.partition, batch.equal_documents),
    )


def _loss_by_position(batch: RankBatch, token_losses: torch.Tensor) -> LossSums:
    """Return the losses [G] of this rank's tokens by the position that each predicts."""
    predicted = batch.position_ids.flatten() + 1
    groups = position_buckets(predicted, starts_on(predicted.device, batch.row_tokens))
    return loss_sums(token_losses, batch.loss_mask.flatten(), groups, len(position_starts(batch.row_tokens)))


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

    def forward(self, batch: RankBatch, forward_out: HeadLoss) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return (loss to differentiate, what Megatron divides the sum of all by, int32, report).

        In the report, ``loss_sum_and_ub_size`` float64 [2] is the sum of token losses and the number of target tokens.
        ``loss_by_position`` has the ``LossSums`` of each bucket of positions of the predicted tokens. ``domain`` is
        that of the row.
        """
        # Not by name: mixed precision makes a plain tuple of it.
        loss_sum, token_losses = forward_out
        loss_mask = batch.loss_mask.flatten().double()
        target_tokens = loss_mask.sum()
        report = {
            "loss_sum_and_ub_size": torch.stack([(token_losses.double() * loss_mask).sum(), target_tokens]),
            "loss_by_position": _loss_by_position(batch, token_losses),
            "domain": batch.domain,
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
