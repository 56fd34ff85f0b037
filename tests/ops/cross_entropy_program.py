"""Compare the divided loss head with the undivided one; run under torchrun with 2 or 4 ranks.

Every rank computes the undivided result itself and compares its own part. The first difference ends the program.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_prolong.ops.linear_cross_entropy import linear_cross_entropy

HIDDEN_SIZE, ROWS_PER_RANK, FACTOR = 6, 24, 0.37
LOSS_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}
# In bfloat16 the gradient of the logits, its products and their sum over ranks are rounded, by up to 2^-9 each.
GRADIENT_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def require_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Fail if the largest difference exceeds ``tolerance`` of the largest expected value."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance}"


def inputs(tokens: int, vocab_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return hidden, weight, labels and mask of the whole problem, the same on every rank.

    The entries of hidden and weight are halves, so that bfloat16 holds their logits exactly.
    """
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab_size)
    hidden = torch.randint(-2, 3, (tokens, HIDDEN_SIZE), generator=generator).to(dtype) / 2
    weight = torch.randint(-2, 3, (vocab_rows, HIDDEN_SIZE), generator=generator).to(dtype) / 2
    mask = torch.randint(0, 3, (tokens,), generator=generator).float() / 2
    labels = torch.randint(0, vocab_size, (tokens,), generator=generator)
    return hidden, weight, labels.masked_fill(mask == 0, -100), mask


def undivided(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, ...]:
    """Return token losses, their sum, and both gradients of FACTOR times it, by plain torch in float64."""
    hidden, weight = (x.to(torch.float64, copy=True).requires_grad_() for x in (hidden, weight))
    losses = F.cross_entropy((hidden @ weight.T)[:, :vocab_size], labels, reduction="none", ignore_index=-100)
    loss_sum = (losses * mask).sum()
    return losses, loss_sum, *torch.autograd.grad(loss_sum * FACTOR, [hidden, weight])


def check(
    group: dist.ProcessGroup,
    tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    chunk_tokens: int,
    scale: int,
    *,
    divided: bool,
) -> None:
    """Compare losses and gradients.

    ``divided`` tokens are Megatron's sequence parallelism; ``scale`` is a factor on the logits.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    hidden, weight, labels, mask = inputs(tokens, ranks * ROWS_PER_RANK, vocab_size, dtype)
    hidden *= scale
    expected = undivided(hidden, weight, labels, mask, vocab_size)
    mine = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks) if divided else slice(None)
    rows = slice(rank * ROWS_PER_RANK, (rank + 1) * ROWS_PER_RANK)
    part, shard = hidden[mine].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    result = linear_cross_entropy(
        part,
        shard,
        labels,
        mask,
        chunk_tokens=chunk_tokens,
        vocab_size=vocab_size,
        tp_group=group,
        sequence_parallel=divided,
    )
    (result.loss_sum * FACTOR).backward()
    case = f"rank {rank} of {ranks}, {tokens} tokens, vocabulary {vocab_size}, {dtype}, divided: {divided}"
    for name, got, want, tolerances in (
        ("token losses", result.token_losses.detach(), expected[0], LOSS_TOLERANCES),
        ("loss sum", result.loss_sum.detach(), expected[1], LOSS_TOLERANCES),
        ("hidden gradient", part.grad, expected[2][mine], GRADIENT_TOLERANCES),
        ("weight gradient", shard.grad, expected[3][rows], GRADIENT_TOLERANCES),
    ):
        if want.numel():
            require_close(got, want, tolerances[dtype], f"{name}, {case}")
    everyone = [torch.empty_like(result.token_losses) for _ in range(ranks)]
    dist.all_gather(everyone, result.token_losses.detach(), group=group)
    assert all(torch.equal(losses, everyone[0]) for losses in everyone), f"ranks disagree on losses: {case}"


def check_refusal(group: dist.ProcessGroup) -> None:
    """A label that no rank has is refused on every rank, before any exchange."""
    ranks = dist.get_world_size(group)
    hidden, weight, labels, mask = inputs(4, ROWS_PER_RANK, ROWS_PER_RANK, torch.float32)
    try:
        linear_cross_entropy(
            hidden, weight, labels.fill_(ranks * ROWS_PER_RANK), mask.fill_(1), tp_group=group, chunk_tokens=2
        )
    except RuntimeError:
        return
    raise AssertionError("a label outside the vocabulary was accepted")


def main() -> None:
    """Run every check over the whole world and, with four ranks, over each half of it."""
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    halves = [dist.new_group([first, first + 1]) for first in range(0, world, 2)] if world > 2 else []
    groups = [dist.group.WORLD, *halves[dist.get_rank() // 2 :][:1]]
    for group in groups:
        ranks = dist.get_world_size(group)
        dtypes = list(LOSS_TOLERANCES) if group is dist.group.WORLD else [torch.float64]
        # 26 of the vocabulary leave two columns to the second rank and none to those after it.
        for divided, vocab_size, dtype in itertools.product((False, True), (26, ranks * ROWS_PER_RANK), dtypes):
            for tokens, chunk_tokens, scale in ((5 * ranks, 2 * ranks, 1), (2 * ranks, 1, 1024), (0, 4, 1)):
                check(group, tokens, vocab_size, dtype, chunk_tokens, scale, divided=divided)
        check_refusal(group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
