"""NaN and infinity in the weights that a stage starts from: found while they are read, refused on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch.nn import Parameter

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights.hf_reader import count_non_finite

_LISTED = 5
"""Tensors that a message names."""


@torch.no_grad()
def check_parameters(named: Iterable[tuple[str, Parameter]], what: str) -> None:
    """Refuse parameters with NaN or infinity in them; called on every rank.

    Args:
        named: Parameters of this rank by name.
        what: Where they come from, as the user wrote it.

    Raises:
        CheckpointError: On every rank, naming tensors of any.
    """
    remedy = "Use one from before its loss went wrong; the metrics.jsonl of the run tells."
    refuse_non_finite({name: count_non_finite(parameter) for name, parameter in named}, what, remedy)


def refuse_non_finite(counts: Mapping[str, int], what: str, remedy: str) -> None:
    """Refuse a parent if any rank has found NaN or infinity; called on every rank.

    Args:
        counts: NaN and infinite values by tensor, of this rank.
        what: The parent as the user wrote it.
        remedy: What to do.

    Raises:
        CheckpointError: On every rank, with the sums over ranks.
    """
    of_ranks: list[dict[str, int]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_ranks, {name: count for name, count in counts.items() if count})
    total: Counter[str] = Counter()
    for of_rank in of_ranks:
        total.update(of_rank)
    if not total:
        return
    named = ", ".join(f"{name} ({count})" for name, count in sorted(total.items())[:_LISTED])
    more = f" and {len(total) - _LISTED} more tensors" if len(total) > _LISTED else ""
    raise CheckpointError(
        what,
        f"{sum(total.values())} of its weights are NaN or infinite: {named}{more}.",
        remedy,
    )
