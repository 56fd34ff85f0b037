"""Ranks that meet, for the first time and again."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from nemo_prolong.distributed.rendezvous import agree_on_name, refuse_together
from nemo_prolong.errors import CheckpointError
from tests.support.launches import run_program

PROGRAM = "tests.engine.meet_program"


def meet(store: HashStore, world_size: int = 4) -> str:
    """Let all ranks agree; return the name."""
    with ThreadPoolExecutor(world_size) as pool:
        # The others are there first: they find what rank 0 left in the attempt before.
        names = list(pool.map(lambda rank: agree_on_name(store, rank, world_size), reversed(range(world_size))))
    assert len(set(names)) == 1
    return names[0]


def test_ranks_at_a_used_store_agree_on_a_new_name() -> None:
    store = HashStore()
    assert len({meet(store) for _ in range(5)}) == 5


def test_what_ranks_left_that_came_and_went_confuses_nobody() -> None:
    store = HashStore()
    store.set("word/1", "of a rank that was killed before it was answered")
    store.set("answer/another", "a name")
    first = meet(store)
    store.set("word/2", "of a rank that was killed in the second attempt")
    assert meet(store) != first


def test_ranks_that_do_not_come_are_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"^ranks \[1, 2\] did not start within 0\.2 s$"):
        agree_on_name(store, 0, 3)


def test_what_one_rank_refuses_all_refuse() -> None:
    store = HashStore()

    def check(rank: int) -> None:
        if rank == 1:
            raise CheckpointError("a file", "it is damaged.", "Use another.")

    def run(rank: int) -> str:
        with pytest.raises(CheckpointError) as refusal:
            refuse_together(store, lambda: check(rank), rank, 3)
        return str(refusal.value)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == ["a file: it is damaged. Use another."] * 3


def test_ranks_that_refuse_nothing_go_on() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda rank: refuse_together(store, lambda: None, rank, 3), range(3))) == [None] * 3


@pytest.mark.distributed
def test_ranks_started_again_form_their_groups_again() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    output = run_program([*torchrun, "-m", PROGRAM], timeout_seconds=120)
    attempts = sorted(line for line in output.splitlines() if line.startswith("attempt"))
    assert attempts[-2:] == ["attempt 1: rank 0 of 2", "attempt 1: rank 1 of 2"]
