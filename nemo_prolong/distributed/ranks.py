"""What all ranks must know: a failure on one of them, a decision of rank 0."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, Store

from nemo_prolong.errors import CheckpointError

_POLL_SECONDS = 0.02


class RankFailure(Exception):
    """An action failed on at least one rank; raised on every rank, with the reason of each that failed."""


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
    """Run an action on rank 0 while the others wait; return its result there and None elsewhere.

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
    """Return rank 0's value; the others' is ignored."""
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


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of ranks, before there are process groups."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def open_store() -> Store:
    """Return the store that the ranks meet at, before there are process groups; they are formed with it later.

    Nothing is in it, also when torchrun has started the ranks again: it keeps the store of the attempt before, whose
    keys would have them connect to processes that are gone (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        TimeoutError: On rank 0, if other ranks do not come.
    """
    rank, world_size = rank_and_size()
    if world_size == 1:
        # A process alone needs no port to meet others; a free one could be taken before it is bound.
        return HashStore()
    store = next(iter(torch.distributed.rendezvous("env://")))[0]
    return PrefixStore(agree_on_name(store, rank, world_size), store)


def agree_on_name(store: Store, rank: int, world_size: int) -> str:
    """Return a name that is the same on all ranks and was never used before.

    Every other rank says a random word, and rank 0 answers to the word. What it answers to a word of an attempt before
    nobody reads. A number of the attempt would be simpler, but torchrun's differs between hosts.

    Args:
        store: What the ranks share, with anything in it.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        TimeoutError: On rank 0, if other ranks do not come within the store's timeout.
    """
    if rank == 0:
        return _answer_all(store, world_size)
    word = secrets.token_hex(8)
    store.set(f"word/{rank}", word)
    name = store.get(f"answer/{word}").decode()
    store.set(f"{name}/here/{rank}", "")
    return name


def _answer_all(store: Store, world_size: int) -> str:
    name, absent = secrets.token_hex(8), set(range(1, world_size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while absent:
        for rank in sorted(absent):
            if store.check([f"{name}/here/{rank}"]):
                absent.remove(rank)
            elif store.check([f"word/{rank}"]):
                store.set(f"answer/{store.get(f'word/{rank}').decode()}", name)
        if absent and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(absent)} did not start within {store.timeout.total_seconds():g} s")
        time.sleep(_POLL_SECONDS)
    return name


def decided_by_rank_zero(store: Store, key: str, value: str | None) -> str | None:
    """Return rank 0's value to every rank, through the store.

    Args:
        store: Of ``open_store``.
        key: Name of the decision, once for each store.
        value: What rank 0 decided; ignored on other ranks.
    """
    if rank_and_size()[0] == 0:
        store.set(key, value or "")
        return value
    return store.get(key).decode() or None


def refuse_together(store: Store, check: Callable[[], None], rank: int, world_size: int) -> None:
    """Run a check on every rank before there are process groups.

    No rank leaves before all know: rank 0 may be the one that keeps the store, and the others would end of its absence.

    Args:
        store: Of ``open_store``; once for each store.
        check: May raise a ``CheckpointError``.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        CheckpointError: On every rank, if the check raised on any: that of the first.
    """
    refusal: list[str] = []
    try:
        check()
    except CheckpointError as error:
        refusal = [error.what, error.rule, error.remedy]
    store.set(f"refusal/{rank}", json.dumps(refusal))
    if rank == 0:
        refusals = [json.loads(store.get(f"refusal/{other}")) for other in range(world_size)]
        refusal = next(filter(None, refusals), [])
        store.set("refusal", json.dumps(refusal))
        for other in range(1, world_size):
            store.get(f"refusal/known/{other}")
    else:
        refusal = json.loads(store.get("refusal"))
        store.set(f"refusal/known/{rank}", "")
    if refusal:
        raise CheckpointError(*refusal)
