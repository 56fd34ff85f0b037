"""Context-parallel attention on real process groups; ``context_parallel_program.py RANKS OUTPUT`` writes figures.

Every check is one entry of the JSON that rank 0 writes: what differs from one rank, largest over the ranks. The test
that started this program judges them.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_prolong.errors import ConfigError
from nemo_prolong.ops.attention import document_attention
from nemo_prolong.ops.context_parallel import DocumentPartition, context_parallel_attention
from tests.support.attention_tools import QUERY_HEADS, LargestTensor, boundaries, random_inputs, random_weights

EXCHANGES = ("p2p", "all_gather", "a2a")

ROWS: dict[str, list[int]] = {
    "short, odd and empty documents": [1, 2, 3, 0, 17, 1, 40, 5, 1],
    "one document longer than a shard": [67],
    "a document longer than a shard among others": [3, 150, 1, 7, 2],
    "equal documents": [16, 16, 16, 16],
    "documents of one token": [1] * 9,
    "shards of padding alone": [1],
}

Results = tuple[torch.Tensor, ...]


def random_rows(count: int) -> dict[str, list[int]]:
    """Return rows of random documents, half of them short."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for number in range(count):
        short = torch.randint(1, 10, (4,), generator=generator)
        long = torch.randint(1, 120, (3,), generator=generator)
        order = torch.randperm(7, generator=generator)
        rows[f"random documents {number}"] = torch.cat([short, long])[order].tolist()
    return rows


def shard_of(row: torch.Tensor, partition: DocumentPartition, fill: float = 0) -> torch.Tensor:
    """Return this rank's part of ``row`` [S, ...]."""
    return partition.split(row.detach().movedim(0, -1), fill).movedim(-1, 0).contiguous()


def one_rank(inputs: list[torch.Tensor], weights: torch.Tensor, lengths: list[int]) -> Results:
    """Return output and gradients of the row on one rank."""
    output = document_attention(*inputs, boundaries(lengths), softmax_scale=0.5)
    query, key, value = torch.autograd.grad(output, inputs, weights)
    # A token alone in its document sees itself whatever its score: these gradients are zero, not what rounding leaves.
    alone = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)) == 1
    return output.detach(), query.masked_fill(alone[:, None, None], 0), key.masked_fill(alone[:, None, None], 0), value


def all_ranks(
    rows: list[torch.Tensor], partition: DocumentPartition, comm_type: str, group: Any = None, fill: float = 0
) -> Results:
    """Return output and gradients of query, key, value and weight ``rows``, joined from the shards of all ranks."""
    query, key, value, weight = (shard_of(row, partition, fill) for row in rows)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = context_parallel_attention(*leaves, partition, group, comm_type, softmax_scale=0.5)
    # Padding has no target: nothing flows back from its output.
    weight = torch.where(shard_of(torch.ones(len(rows[0]), 1, 1), partition) > 0, weight, 0)
    results = output.detach(), *torch.autograd.grad(output, leaves, weight)
    return tuple(joined(result, partition, group) for result in results)


def joined(shard: torch.Tensor, partition: DocumentPartition, group: Any) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(partition.context_parallel_size)]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return partition.join(torch.stack(shards))


def difference(results: Results, expected: Results) -> float:
    """Return the largest difference relative to the largest value of each expected tensor (or to 1 if all are 0)."""
    pairs = zip(results, expected, strict=True)
    return max(float((a.double() - b).abs().max() / (b.abs().max() if b.any() else 1)) for a, b in pairs)


def exactness() -> dict[str, float]:
    """Compare every exchange with one rank on every row."""
    size, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for name, lengths in {**ROWS, **random_rows(2)}.items():
        partition = DocumentPartition.of_row(boundaries(lengths), size, rank)
        for key_heads, exchanges in ((QUERY_HEADS, EXCHANGES), (2, EXCHANGES if size == 2 else EXCHANGES[:2])):
            inputs, weights = random_inputs(sum(lengths), key_heads), random_weights(sum(lengths))
            expected = one_rank(inputs, weights, lengths)
            for comm_type in exchanges:
                for dtype in (torch.float64, torch.float32):
                    results = all_ranks([x.to(dtype) for x in (*inputs, weights)], partition, comm_type)
                    label = f"{dtype}, {comm_type}, {key_heads} key heads, {name}".removeprefix("torch.")
                    found[label] = difference(results, expected)
    return found


def independence() -> dict[str, bool]:
    """Change one document, and padding, and look for a changed bit elsewhere."""
    lengths, changed = [5, 40, 1, 40, 9], 1
    partition = DocumentPartition.of_row(boundaries(lengths), dist.get_world_size(), dist.get_rank(), 64)
    rows = [*random_inputs(sum(lengths), QUERY_HEADS, torch.float32), random_weights(sum(lengths), torch.float32)]
    start = sum(lengths[:changed])
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    inside[start : start + lengths[changed]] = True
    found = {}
    for comm_type in EXCHANGES:
        before = all_ranks(rows, partition, comm_type)
        after = all_ranks([torch.where(inside[:, None, None], 3 * x, x) for x in rows], partition, comm_type)
        padded = all_ranks(rows, partition, comm_type, fill=7.0)
        pairs = list(zip(before, after, strict=True))
        found[f"{comm_type}: others keep their bits"] = all(torch.equal(a[~inside], b[~inside]) for a, b in pairs)
        found[f"{comm_type}: the document itself changes"] = all(
            not torch.equal(a[inside], b[inside]) for a, b in pairs
        )
        found[f"{comm_type}: padding changes no bit"] = all(
            torch.equal(a, b) for a, b in zip(before, padded, strict=True)
        )
    return found


class LiveShards(TorchDispatchMode):
    """Counts the tensors of one size that are alive at once, among those that operations make anew."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.alive, self.peak = numel, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = func.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.empty_like, torch.ops.aten.zeros)
        if makes and result.numel() == self.numel:
            self.alive += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(result, self._forget)
        return result

    def _forget(self) -> None:
        self.alive -= 1


def memory() -> dict[str, float]:
    """Watch the ring: nothing as long as the row, and few shards at once."""
    size = dist.get_world_size()
    tokens, key_heads = 1024, 2
    partition = DocumentPartition.of_row(boundaries([tokens]), size, dist.get_rank())
    shards = [shard_of(x, partition).requires_grad_() for x in random_inputs(tokens, key_heads, torch.float32)]
    query_numel, shard_numel = shards[0].numel(), 2 * shards[1].numel()
    # Keys and values have another size than queries, or the count would mix them up.
    shards = [shards[0], *(x[:, :1].detach().requires_grad_() for x in shards[1:])]
    shard_numel //= key_heads
    found: dict[str, float] = {}
    with LargestTensor() as largest, LiveShards(shard_numel) as forward:
        output = context_parallel_attention(*shards, partition)
    with largest, LiveShards(shard_numel) as backward:
        torch.autograd.grad(output.sum(), shards)
    found["largest tensor of the ring, in shards of queries"] = largest.numel / query_numel
    found["shards alive in the ring forward"] = forward.peak
    found["shards alive in the ring backward"] = backward.peak
    return found


def refusals() -> dict[str, str]:
    """Ask a2a for more ranks than there are heads of keys."""
    partition = DocumentPartition.of_row(boundaries([16]), dist.get_world_size(), dist.get_rank())
    shards = [shard_of(x, partition) for x in random_inputs(16, 1)]
    try:
        context_parallel_attention(*shards, partition, None, "a2a")
    except ConfigError as error:
        return {"a2a with one key head": str(error)}
    return {}


def subgroups() -> dict[str, float]:
    """Let two groups of two ranks share one row each, in a world of four."""
    if dist.get_world_size() != 4:
        return {}
    members = ([0, 2], [1, 3])
    groups = [dist.new_group(ranks) for ranks in members]
    number = dist.get_rank() % 2
    lengths = ([30, 1, 5], [2, 50])[number]
    partition = DocumentPartition.of_row(boundaries(lengths), 2, dist.get_rank(groups[number]))
    inputs, weights = random_inputs(sum(lengths), 2), random_weights(sum(lengths))
    expected = one_rank(inputs, weights, lengths)
    rows = [*inputs, weights]
    return {c: difference(all_ranks(rows, partition, c, groups[number]), expected) for c in EXCHANGES}


def rounding() -> dict[str, float]:
    """Return how much further than one rank each exchange is from float64 in bfloat16."""
    lengths = [200, 31]
    partition = DocumentPartition.of_row(boundaries(lengths), dist.get_world_size(), dist.get_rank())
    rows = [*random_inputs(sum(lengths), QUERY_HEADS, torch.bfloat16), random_weights(sum(lengths), torch.bfloat16)]
    wide = [x.detach().double().requires_grad_() for x in rows[:3]]
    expected = one_rank(wide, rows[3].double(), lengths)
    alone = difference(one_rank(rows[:3], rows[3], lengths), expected)
    return {c: difference(all_ranks(rows, partition, c), expected) / alone for c in EXCHANGES}


def run_checks(rank: int, size: int, output: Path) -> None:
    """Run every check as one rank."""
    dist.init_process_group("gloo", init_method=f"file://{output}.store", rank=rank, world_size=size)
    checks = (exactness, independence, memory, refusals, subgroups, rounding)
    mine = {check.__name__: check() for check in checks}
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        output.write_text(json.dumps(everyone))
    dist.destroy_process_group()


def main() -> None:
    """Fork the ranks, so that torch is imported once."""
    size, output = int(sys.argv[1]), Path(sys.argv[2])
    torch.multiprocessing.start_processes(run_checks, (size, output), nprocs=size, start_method="fork")


if __name__ == "__main__":
    main()
