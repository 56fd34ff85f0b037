"""Where ranks meet before there are process groups, and what they decide there."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable

from torch.distributed import HashStore, PrefixStore, Store, rendezvous

from nemo_prolong.distributed.rank_environment import rank_and_size
from nemo_prolong.errors import CheckpointError

_POLL_SECONDS = 0.02


def open_store() -> Store:
    """Return the store that the ranks meet at, before there are process groups. They are formed with it later.

    Nothing is in it, also when torchrun has started the ranks again. torchrun keeps the store of the attempt before,
    whose keys would have them connect to processes that are gone (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        TimeoutError: On rank 0, if other ranks do not come.
    """
    rank, world_size = rank_and_size()
    if world_size == 1:
        # A process alone needs no port to meet others. A free one could be taken before it is bound.
        return HashStore()
    store = next(iter(rendezvous("env://")))[0]
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


def _timeout_seconds(store: Store) -> float:
    seconds: float = store.timeout.total_seconds()  # type: ignore[attr-defined] # missing in torch's stubs
    return seconds


def _answer_all(store: Store, world_size: int) -> str:
    name, absent = secrets.token_hex(8), set(range(1, world_size))
    deadline = time.monotonic() + _timeout_seconds(store)
    while absent:
        for rank in sorted(absent):
            if store.check([f"{name}/here/{rank}"]):
                absent.remove(rank)
            elif store.check([f"word/{rank}"]):
                store.set(f"answer/{store.get(f'word/{rank}').decode()}", name)
        if absent and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(absent)} did not start within {_timeout_seconds(store):g} s")
        time.sleep(_POLL_SECONDS)
    return name


def decided_by_rank_zero(store: Store, key: str, value: str | None) -> str | None:
    """Return rank 0's value to every rank, through the store.

    Args:
        store: Of ``open_store``.
        key: Name of the decision, once for each store.
        value: What rank 0 decided. It is ignored on other ranks.
    """
    if rank_and_size()[0] == 0:
        store.set(key, value or "")
        return value
    return store.get(key).decode() or None


def known_by_all(store: Store, key: str, yes: bool) -> bool:
    """Return rank 0's answer to every rank. No rank may leave with it before all know.

    Args:
        store: Of ``open_store``.
        key: Name of the question, once for each store.
        yes: What rank 0 answers. It is ignored on other ranks.
    """
    rank, world_size = rank_and_size()
    answer = decided_by_rank_zero(store, key, "yes" if yes else None) is not None
    store.set(f"{key}/known/{rank}", "")
    if answer and rank == 0:
        # It may be the one that keeps the store.
        for other in range(world_size):
            store.get(f"{key}/known/{other}")
    return answer


def refuse_together(store: Store, check: Callable[[], None], rank: int, world_size: int) -> None:
    """Run a check on every rank before there are process groups.

    No rank leaves before all know. Rank 0 may be the one that keeps the store, and the others would end of its absence.

    Args:
        store: Of ``open_store``. This is called once for each store.
        check: May raise a ``CheckpointError``.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        CheckpointError: On every rank, if the check raised on any. It is that of the first.
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
