"""Sums over the micro-batches of a step, exact over all ranks.

On a device everything is added there. The host waits once, when the step is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_prolong.ops.token_loss import LossSums
from nemo_prolong.records.run_log import GroupLoss, Groups
from nemo_prolong.telemetry.positions import bucket_names

UNNAMED_DOMAIN = "unnamed"
"""Where rows have no domain."""


@dataclass(frozen=True)
class StepTotals:
    """What a step consisted of, over all ranks.

    Attributes:
        loss: Of all target tokens.
        by_position: Name of each bucket of positions, and its loss. Positions are those of the predicted tokens.
        by_domain: Name of each domain that has a target token in this step, and its loss.
        real_tokens: Tokens without padding.
        squared_tokens: Sum over the documents of the square of their tokens.
        data_wait_seconds: Of the rank that waited longest for its rows.
        memory_bytes: Peak of the rank that needed most.
    """

    loss: GroupLoss
    by_position: Groups
    by_domain: Groups
    real_tokens: int
    squared_tokens: int
    data_wait_seconds: float
    memory_bytes: int


class StepSums:
    """Adds up a step. ``reduce`` is called on all ranks and starts anew.

    Args:
        seq_length: Tokens of a row, which decides the buckets of positions.
    """

    def __init__(self, seq_length: int) -> None:
        self._buckets = bucket_names(seq_length)
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        # In the same order on all ranks, which see the domains in different ones.
        self._domains: list[str] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._loss = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._by_domain: dict[str, torch.Tensor] = {}
        self._real_tokens = self._squared_tokens = 0
        self._data_wait_seconds = 0.0

    def add_data_wait(self, seconds: float) -> None:
        """Add the time that this rank waited for one micro-batch."""
        self._data_wait_seconds += seconds

    def add_row(self, real_tokens: int, squared_tokens: int) -> None:
        """Add the sizes of a row, on one of the ranks that share it."""
        self._real_tokens += real_tokens
        self._squared_tokens += squared_tokens

    def add_losses(self, loss: torch.Tensor, by_position: LossSums, domain: str) -> None:
        """Add the losses of this rank's part of a row, on one of the ranks that share the part.

        Args:
            loss: Sum of token losses and target tokens, float64 [2].
            by_position: Losses by bucket [G].
            domain: Domain of the row.
        """
        self._loss += loss
        sums = torch.stack([by_position.sums, by_position.counts.double()])
        name = domain or UNNAMED_DOMAIN
        self._by_domain[name] = self._by_domain[name] + sums if name in self._by_domain else sums

    def reduce(self, memory_bytes: int) -> StepTotals:
        """Return the totals over all ranks.

        Args:
            memory_bytes: Peak of this rank.
        """
        unknown = sorted(self._by_domain.keys() - set(self._domains))
        new, data_wait, memory = self._all_reduce(
            torch.tensor([len(unknown), self._data_wait_seconds, memory_bytes], dtype=torch.float64),
            torch.distributed.ReduceOp.MAX,
        )
        if new:
            self._learn(unknown)
        totals = self._all_reduce(self._packed(), torch.distributed.ReduceOp.SUM)
        self.clear()
        loss_sum, target_tokens, real_tokens, squared_tokens, *table = totals
        by_domain, by_position = self._named(table)
        return StepTotals(
            loss=GroupLoss(loss_sum, int(target_tokens)),
            by_position=by_position,
            by_domain=by_domain,
            real_tokens=int(real_tokens),
            squared_tokens=int(squared_tokens),
            data_wait_seconds=data_wait,
            memory_bytes=int(memory),
        )

    def _learn(self, unknown: list[str]) -> None:
        """Agree on the names of domains that some rank has met for the first time."""
        names: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(names, unknown)
        self._domains = sorted({*self._domains, *(name for part in names for name in part)})

    def _packed(self) -> torch.Tensor:
        """Return the sums of this rank as one float64 vector. Single numbers come first, then [domains, 2, G]."""
        # float64 is exact for counts below 2**53.
        sizes = torch.tensor([self._real_tokens, self._squared_tokens], dtype=torch.float64, device=self._device)
        nothing = torch.zeros(2, len(self._buckets), dtype=torch.float64, device=self._device)
        tables = [self._by_domain.get(name, nothing).flatten() for name in self._domains]
        return torch.cat([self._loss, sizes, *tables])

    def _named(self, table: list[float]) -> tuple[Groups, Groups]:
        """Return the losses by domain and by position of a flat table [domains, 2, G]."""
        cells = torch.tensor(table, dtype=torch.float64).view(len(self._domains), 2, len(self._buckets))
        domains = zip(self._domains, cells.sum(dim=2).tolist(), strict=True)
        positions = zip(self._buckets, cells.sum(dim=0).T.tolist(), strict=True)
        return (
            {name: GroupLoss(total, int(count)) for name, (total, count) in domains if count},
            {name: GroupLoss(total, int(count)) for name, (total, count) in positions},
        )

    def _all_reduce(self, values: torch.Tensor, operation: Any) -> list[float]:
        values = values.to(self._device)
        torch.distributed.all_reduce(values, op=operation)
        result: list[float] = values.tolist()
        return result
