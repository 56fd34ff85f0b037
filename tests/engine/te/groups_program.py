"""Hierarchical context-parallel groups on 4 gloo ranks, forks of this process; ``groups_program.py OUTPUT``."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_prolong.engine.patches import prepare
from nemo_prolong.engine.patches.process_groups import group_settings
from tests.support.fork_ranks import run_ranks

RANKS = 4


def form_groups(output: Path, rank: int) -> None:
    """Form the groups as NeMo does, and write what every rank finds in them."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    with group_settings([2, 2], 90.0):
        parallel_state.initialize_model_parallel(context_parallel_size=4)
    found = {"ranks": [], "sums": [], "cp": dist.get_process_group_ranks(parallel_state.get_context_parallel_group())}
    for group in parallel_state.get_hierarchical_context_parallel_groups():
        total = torch.tensor(10**rank)
        dist.all_reduce(total, group=group)
        found["ranks"].append(dist.get_process_group_ranks(group))
        found["sums"].append(total.item())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if rank == 0:
        output.write_text(json.dumps(everyone))
    dist.destroy_process_group()


def main() -> None:
    """Be every rank."""
    prepare()
    output = Path(sys.argv[1])
    if any(run_ranks(functools.partial(form_groups, output), RANKS, str(output))):
        sys.exit("\n".join(Path(f"{output}.rank{rank}.log").read_text()[-2000:] for rank in range(RANKS)))


if __name__ == "__main__":
    main()
