"""LM head and cross-entropy in chunks of tokens, so that [T, V] logits never exist.

Owns the last step of the model, from hidden states and the output weight to token losses and both gradients. The
gradients are made while the logits of a chunk are at hand, in the forward pass, which leaves three matrix products
where recomputing the logits in the backward pass takes four. The price is that the loss must be used as a sum. It is
scaled by one factor. The vocabulary may be divided over the ranks of a process group, and so may the tokens
(Megatron's sequence parallelism).

Beyond hidden states, their gradient and one float32 weight gradient, memory is the logits of one chunk at any T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


class HeadLoss(NamedTuple):
    """What the LM head makes of a micro-batch, in float32, or float64 where the inputs are.

    Attributes:
        loss_sum: Sum of token losses times loss mask, scalar. Differentiate this.
        token_losses: Loss of each token [T], zero where the mask is zero, not multiplied by it. For metrics only: a
            backward pass that reaches it raises RuntimeError.
    """

    loss_sum: torch.Tensor
    token_losses: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    chunk_tokens: int = 2048,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    accumulate_into_main_grad: bool = False,
) -> HeadLoss:
    """Return the cross-entropy of ``hidden @ weight.T`` with the labels.

    ``loss_sum`` may be multiplied by any scalar and added to other losses, and goes through backward once. With a
    process group, every rank calls this with the same labels and mask, gets the same losses, and must scale them alike.
    Nothing here waits for a CUDA device. Without grad mode no gradient is computed.

    Args:
        hidden: Hidden states [T, E]; with ``sequence_parallel`` this rank's slice [T / TP, E] of them.
        weight: Output weight [V_local, E] in the dtype of ``hidden``, this rank's rows of it: V_local of V.
        labels: Target ids int64 [T]. Where the mask is zero they may be anything.
        loss_mask: Factor of each token's loss, float [T], not negative. Where it is zero, neither the label nor the
            hidden state of the token matters, even if it is not a number.
        chunk_tokens: Tokens whose logits exist at a time, over all ranks of the group.
        vocab_start: Id of the first row of ``weight``. Rank times V_local if None.
        vocab_size: Size of the vocabulary without padding. Rows of ids from there on take no part and get a zero
            gradient. If None, all rows of all ranks count.
        tp_group: Ranks over which the vocabulary is divided. None if it is not.
        sequence_parallel: Hidden states are divided over ``tp_group``, in the order of its ranks.
        accumulate_into_main_grad: Add the weight gradient to ``weight.main_grad``, Megatron's accumulation buffer,
            where that exists, and tell Megatron so by ``grad_added_to_main_grad``.

    Raises:
        RuntimeError: If a label outside the vocabulary has a mask that is not zero. On CUDA it is raised by the device,
            later. In the backward pass: if ``loss_sum`` is differentiated twice, or ``token_losses`` at all.
    """
    layout = _layout(hidden, weight, chunk_tokens, vocab_start, vocab_size, tp_group, sequence_parallel)
    assert labels.shape == loss_mask.shape == (layout.sources * hidden.size(0),), (hidden.shape, labels.shape)
    _require_labels_in_vocabulary(labels, loss_mask, layout)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        losses = _Head.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            hidden, weight, labels, loss_mask, layout, accumulate_into_main_grad
        )
        return HeadLoss(*losses)
    return _head_loss(_run_chunks(hidden, weight, labels, loss_mask, layout), loss_mask)


@dataclass(frozen=True)
class _Layout:
    """How vocabulary and tokens lie on the ranks, and the exchanges that follow from it.

    Attributes:
        start: Id of the first row of the weight here.
        columns: Rows of the weight here that belong to the vocabulary without padding. May be 0.
        vocab_size: Size of that vocabulary.
        rows: Rows of ``hidden`` here in one chunk.
        sources: Ranks that each hold a slice of the tokens. 1 without sequence parallelism.
        group: Ranks of the vocabulary, None if there is one.
    """

    start: int
    columns: int
    vocab_size: int
    rows: int
    sources: int
    group: dist.ProcessGroup | None

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens [sources * N, E] of a chunk from each rank's [N, E]."""
        if self.sources == 1:
            return rows
        tokens = rows.new_empty(self.sources * rows.size(0), rows.size(1))
        dist.all_gather_into_tensor(tokens, rows.contiguous(), group=self.group)
        return tokens

    def hidden_gradient(self, grad_logits: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the gradient of a chunk into ``rows`` [N, E]: summed over the vocabulary, divided as it was gathered.

        Args:
            grad_logits: Gradient of the logits [sources * N, V_local].
            weight: [V_local, E].
            rows: Contiguous.
        """
        if self.sources == 1:
            torch.mm(grad_logits, weight, out=rows)
            self.all_reduce(rows)
        else:
            dist.reduce_scatter_tensor(rows, torch.mm(grad_logits, weight), group=self.group)

    def all_reduce(self, values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce over the ranks of the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values


def _layout(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    chunk_tokens: int,
    vocab_start: int | None,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> _Layout:
    """Return the layout of a call."""
    assert hidden.dtype == weight.dtype and hidden.size(1) == weight.size(1), (hidden.shape, weight.shape)
    assert chunk_tokens > 0, chunk_tokens
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    sources = ranks if sequence_parallel else 1
    if vocab_start is None:
        vocab_start = 0 if tp_group is None else dist.get_rank(tp_group) * weight.size(0)
    if vocab_size is None:
        vocab_size = ranks * weight.size(0)
    return _Layout(
        start=vocab_start,
        columns=min(max(vocab_size - vocab_start, 0), weight.size(0)),
        vocab_size=vocab_size,
        rows=max(chunk_tokens // sources, 1),
        sources=sources,
        group=tp_group if ranks > 1 else None,
    )


def _require_labels_in_vocabulary(labels: torch.Tensor, loss_mask: torch.Tensor, layout: _Layout) -> None:
    """Raise RuntimeError if a token that counts has a label that is no id, without waiting for the device."""
    legal = (labels >= 0) & (labels < layout.vocab_size) | (loss_mask == 0)
    torch._assert_async(legal.all(), f"a label that counts is outside the vocabulary of {layout.vocab_size} ids")


class _Head(torch.autograd.Function):
    """The forward pass computes losses and gradients. The backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        layout: _Layout,
        accumulate_into_main_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        grad_weight = weight.new_zeros(weight.shape, dtype=_loss_dtype(hidden)) if needs_weight else None
        losses = _run_chunks(hidden, weight, labels, loss_mask, layout, grad_hidden, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_with_main_grad = weight if accumulate_into_main_grad and needs_weight else None
        ctx.spent = False
        # An output that nobody differentiates must arrive in backward as None, not as zeros.
        ctx.set_materialize_grads(False)
        return _head_loss(losses, loss_mask)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss_sum: torch.Tensor | None, grad_token_losses: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if grad_token_losses is not None:
            raise RuntimeError("token_losses carry no gradient, their sum does: differentiate loss_sum instead.")
        if ctx.spent:
            raise RuntimeError("loss_sum was differentiated before: its gradients were scaled in place and are gone.")
        assert grad_loss_sum is not None
        ctx.spent = True
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss_sum)
        weight = ctx.weight_with_main_grad
        if weight is not None and hasattr(weight, "main_grad"):
            grad_weight = _add_to_main_grad(weight, grad_weight, grad_loss_sum)
        elif grad_weight is not None:
            grad_weight.mul_(grad_loss_sum)
        return grad_hidden, grad_weight, None, None, None, None


def _add_to_main_grad(
    weight: torch.nn.Parameter, grad_weight: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor | None:
    """Add the scaled gradient to ``weight.main_grad`` and return what autograd shall see in its place.

    Megatron's hook on the parameter, if it has one, wants some gradient to be there and leaves it out of ``main_grad``.
    For weights shared with the embedding it adds it. Zeros without memory of their own suit both.
    """
    main_grad: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]  # Megatron's, on a plain parameter
    main_grad.addcmul_(grad_weight, factor)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return weight.new_zeros(()).expand(weight.shape)


def _loss_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of softmax, losses and weight gradient."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _head_loss(losses: torch.Tensor, loss_mask: torch.Tensor) -> HeadLoss:
    """Return the losses [T] with their masked sum, which is accumulated in float64."""
    return HeadLoss((losses * loss_mask).sum(dtype=torch.float64).to(losses.dtype), losses)


@torch.no_grad()
def _run_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    layout: _Layout,
    grad_hidden: torch.Tensor | None = None,
    grad_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the token losses [T]; write ``grad_hidden`` and add to ``grad_weight`` where they are given.

    Both are gradients of the masked sum of the losses. Rows of ``grad_weight`` outside the vocabulary stay as they are.
    """
    dtype = _loss_dtype(hidden)
    # Token i of source s is token s * len(hidden) + i of the micro-batch.
    by_source = (layout.sources, hidden.size(0))
    labels, loss_mask = labels.view(by_source), loss_mask.to(dtype).view(by_source)
    losses = torch.empty(by_source, dtype=dtype, device=hidden.device)
    for start in range(0, hidden.size(0), layout.rows):
        rows = slice(start, start + layout.rows)
        mask = loss_mask[:, rows].flatten()
        chunk_losses = _run_chunk(
            layout.gather(hidden[rows]).masked_fill(mask[:, None] == 0, 0),
            weight[: layout.columns],
            labels[:, rows].flatten(),
            mask,
            layout,
            None if grad_hidden is None else grad_hidden[rows],
            None if grad_weight is None else grad_weight[: layout.columns],
        )
        losses[:, rows] = chunk_losses.view(layout.sources, -1)
    return losses.flatten()


def _run_chunk(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    layout: _Layout,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Return the losses [N] of the tokens [N, E] of one chunk; write and add to the gradients that are given.

    A function of its own so that the logits of one chunk are gone before those of the next are made.
    """
    logits = torch.mm(tokens, weight.t()).to(mask.dtype)
    target, here = _target_columns(labels, mask, layout)
    losses, sums = _exponentiate(logits, target, here, layout)
    if grad_hidden is not None or grad_weight is not None:
        # Rebinding frees the wider logits where the products want a narrower dtype.
        logits = _logit_gradient(logits, sums, target, here, mask).to(tokens.dtype)
    if grad_hidden is not None:
        layout.hidden_gradient(logits, weight, grad_hidden)
    if grad_weight is not None:
        _add_product(grad_weight, logits.t(), tokens)
    return losses.masked_fill(mask == 0, 0)


def _target_columns(labels: torch.Tensor, mask: torch.Tensor, layout: _Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of each label here (0 if it is elsewhere) and whether it is here."""
    columns = labels - layout.start
    here = (columns >= 0) & (columns < layout.columns) & (mask != 0)
    return columns.masked_fill(~here, 0), here


def _exponentiate(
    logits: torch.Tensor, target: torch.Tensor, here: torch.Tensor, layout: _Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace logits [N, V_local] by their exponentials and return (losses [N], sums of exponentials over V [N]).

    Both are relative to the largest logit of the token, so that no exponential exceeds 1.
    """
    if layout.columns:
        highest, picked = logits.amax(dim=1), logits.gather(1, target[:, None])[:, 0]
    else:
        highest, picked = logits.new_full((len(logits),), -torch.inf), logits.new_zeros(len(logits))
    layout.all_reduce(highest, dist.ReduceOp.MAX)
    picked = torch.where(here, picked - highest, 0)
    logits.sub_(highest[:, None]).exp_()
    sums, picked = layout.all_reduce(torch.stack([logits.sum(dim=1), picked]))
    return sums.log() - picked, sums


def _logit_gradient(
    exponentials: torch.Tensor, sums: torch.Tensor, target: torch.Tensor, here: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Turn exponentials [N, V_local] into the gradient of the masked loss sum by the logits, in place."""
    exponentials.mul_((mask / sums)[:, None])
    if exponentials.size(1):
        # With one column per row no position is written twice, which keeps this deterministic.
        tokens = torch.arange(len(target), device=target.device)
        exponentials[tokens, target] -= torch.where(here, mask, 0)
    return exponentials


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to ``total``, whose dtype may be wider than theirs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))
