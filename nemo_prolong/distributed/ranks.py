"""What all ranks must know once there are process groups, such as a failure on one of them or a value of rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class RankFailure(Exception):
    """An action failed on at least one rank. It is raised on every rank, with the reason of each that failed."""


def run_on_all_ranks(action: Callable[[], Any]) -> Any:
    """Run an action without communication on every rank and return this rank's result.

    Raises:
        RankFailure: On every rank, if the action raised on any.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as raised:  # a disk full shows as OSError, RuntimeError or a wrapped one, by the library
        error = f"rank {torch.distributed.get_rank()}: {raised or type(raised).__name__}"
        failure = raised
    if agree_any(error is not None):
        reasons: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(reasons, error)
        message = "; ".join(reason for reason in reasons if reason)
        raise RankFailure(message) from (failure if error else None)
    return result


def run_on_rank_zero(action: Callable[[], Any]) -> Any:
    """Run an action on rank 0 while the others wait. Return its result there and None elsewhere.

    Raises:
        RankFailure: On every rank, if it raised.
    """
    return run_on_all_ranks(action if torch.distributed.get_rank() == 0 else lambda: None)


def agree_any(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    return _reduce(flag, torch.distributed.ReduceOp.MAX)


def agree_all(flag: bool) -> bool:
    """Return whether the flag is set on every rank."""
    return _reduce(flag, torch.distributed.ReduceOp.MIN)


def _reduce(flag: bool, operation: Any) -> bool:
    value = torch.tensor(int(flag), device=_device())
    torch.distributed.all_reduce(value, op=operation)
    return bool(value)


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's value. The values of other ranks are ignored."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=_device())
    return values[0]


def gather_on_rank_zero(value: Any) -> list[Any] | None:
    """Return the values of all ranks in their order on rank 0, None elsewhere."""
    values = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(value, values)
    return values


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
