"""Sums of token losses by group, where a group is a range of positions in the document, a domain, or both.

Sums and counts of several micro-batches and ranks add up. Only who prints a mean divides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LossSums(NamedTuple):
    """Token losses of each of G groups.

    Attributes:
        sums: Sum of token losses, float64 [G].
        counts: Target tokens, int64 [G]; zero where the group has none.
    """

    sums: torch.Tensor
    counts: torch.Tensor


def position_buckets(position_ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the bucket of each position, int64 of the shape of ``position_ids``.

    Args:
        position_ids: Positions inside the documents, int64.
        starts: First position of each bucket, ascending, int64 [G]. The last bucket has no end. Positions before the
            first start are in bucket -1, which no sum counts.
    """
    return torch.bucketize(position_ids, starts, right=True) - 1


@torch.no_grad()
def loss_sums(token_losses: torch.Tensor, loss_mask: torch.Tensor, groups: torch.Tensor, num_groups: int) -> LossSums:
    """Return the sum of losses and the number of target tokens of each group, deterministically.

    Nothing here waits for a CUDA device. Memory is 8 bytes times groups times tokens.

    Args:
        token_losses: Losses [T].
        loss_mask: [T]; tokens where it is zero do not count, whatever their loss. The others count fully.
        groups: Group of each token, int64 [T]; tokens of groups outside 0 .. num_groups - 1 do not count.
        num_groups: G.
    """
    # Not index_add, because on CUDA it adds in the order in which threads arrive.
    member = (groups == torch.arange(num_groups, device=groups.device)[:, None]) & (loss_mask != 0)
    return LossSums(torch.where(member, token_losses.double(), 0.0).sum(dim=1), member.sum(dim=1))
