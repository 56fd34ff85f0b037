"""Exchanges between context- and tensor-parallel ranks on short rows, in forks of this process.

``test_context_parallel.py`` and ``test_linear_cross_entropy.py`` have many rows and more ranks, in processes of their
own. These forks run the code as this process has it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# torch imports this late, and every fork would do so again.
import torch.fx.experimental.symbolic_shapes

from nemo_prolong.errors import ConfigError
from nemo_prolong.ops.context_parallel import DocumentPartition, context_parallel_attention, ring
from tests.ops import cross_entropy_program
from tests.ops.context_parallel_program import all_ranks, difference, one_rank, shard_of
from tests.support.attention_tools import boundaries, random_inputs, random_weights

LENGTHS = [1, 0, 9, 2, 30, 7]


def compare(comm_type: str) -> dict[str, float]:
    """Return how far an exchange is from one rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    partition = DocumentPartition.of_row(boundaries(LENGTHS), size, rank)
    inputs, weights = random_inputs(sum(LENGTHS), 2), random_weights(sum(LENGTHS))
    results = all_ranks([*inputs, weights], partition, comm_type)
    assert {x.dtype for x in results} == {torch.float64}
    single = [x.float() for x in (*inputs, weights)]
    return {
        "float64": difference(results, one_rank(inputs, weights, LENGTHS)),
        "float32": difference(all_ranks(single, partition, comm_type), one_rank(inputs, weights, LENGTHS)),
    }


def one_of_the_ranks(rank: int, size: int, action: Callable[[], object], directory: Path) -> None:
    store, patience = f"file://{directory}/store", timedelta(seconds=15)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=patience)
    (directory / f"{rank}.json").write_text(json.dumps(action()))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, action: Callable[[], object], directory: Path) -> list[Any]:
    """Run an action on some ranks and return what each returned."""
    torch.multiprocessing.start_processes(one_of_the_ranks, (size, action, directory), nprocs=size, start_method="fork")
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize(("comm_type", "ranks"), [("p2p", 3), ("all_gather", 2), ("a2a", 2)])
def test_an_exchange_gives_what_one_rank_gives(comm_type: str, ranks: int, tmp_path: Path) -> None:
    for found in on_ranks(ranks, functools.partial(compare, comm_type), tmp_path):
        assert found["float64"] <= 1e-12 and found["float32"] <= 1e-5


def transfers() -> list[list[int]]:
    """Return the tags of the messages that a rank sends in a forward and in a backward pass of the ring."""
    sent: list[int] = []
    pass_on = ring._Ring.pass_on

    def noting(self: Any, tensor: torch.Tensor, tag: int) -> Any:
        sent.append(tag)
        return pass_on(self, tensor, tag)

    ring._Ring.pass_on = noting  # type: ignore[method-assign]
    partition = DocumentPartition.of_row(boundaries(LENGTHS), dist.get_world_size(), dist.get_rank())
    shards = [shard_of(x, partition).requires_grad_() for x in random_inputs(sum(LENGTHS), 2)]
    output = context_parallel_attention(*shards, partition)
    forward = list(sent)
    output.sum().backward()
    return [forward, sent[len(forward) :]]


def test_the_ring_sends_each_shard_no_further_than_it_must(tmp_path: Path) -> None:
    # Two shards pass by, and in the backward pass three gradients.
    assert on_ranks(3, transfers, tmp_path) == [[[0, 0], [0, 1, 0, 1, 1]]] * 3


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 3), (3, 4)])
def test_heads_that_do_not_divide_are_refused_by_a2a(query_heads: int, key_heads: int) -> None:
    partition = DocumentPartition.of_row(boundaries([8]), 2, 0)
    query, key, value = (torch.zeros(4, heads, 8) for heads in (query_heads, key_heads, key_heads))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr(dist, "get_rank", lambda group: 0)
        patch.setattr(dist, "get_world_size", lambda group: 2)
        context_parallel_attention(query, key, value, partition, None, "a2a")
    assert str(caught.value) == (
        "parallelism.cp_comm_type=a2a: a2a gives every context-parallel rank a share of the heads, and "
        f"{query_heads} query heads and {key_heads} key-value heads per tensor-parallel rank do not both divide by "
        "parallelism.context_parallel_size=2. Set parallelism.cp_comm_type=p2p, which has no limit on heads."
    )


def head_over_ranks() -> None:
    """Compare the loss head, divided by vocabulary and by tokens, with the whole one."""
    check = functools.partial(cross_entropy_program.check, dist.group.WORLD, dtype=torch.float64, scale=1)
    for divided in (False, True):
        # 26 of the vocabulary leave two columns to the second rank, and 24 none.
        for vocab_size in (24, 26, 48):
            check(10, vocab_size, chunk_tokens=4, divided=divided)
    check(4, 26, chunk_tokens=1, divided=True)
    cross_entropy_program.check_refusal(dist.group.WORLD)


def test_a_vocabulary_over_two_ranks_gives_the_whole_loss(tmp_path: Path) -> None:
    on_ranks(2, head_over_ranks, tmp_path)
