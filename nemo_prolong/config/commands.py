"""Render the command that starts a stage, as a user would type it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_TRAIN = "scripts/train.py"


def train_command(overrides: Sequence[str], ranks_per_node: int = 1, num_nodes: int = 1) -> str:
    """Return the command line that trains with these overrides on this many ranks.

    Args:
        overrides: What is typed after the script, e.g. ``["+exp=mini/stage1"]``.
        ranks_per_node: GPUs (or CPU processes) per machine.
        num_nodes: Machines; with more than one, the command is to be run on each of them.

    >>> train_command(["+exp=mini/stage1"], ranks_per_node=2)
    'torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1'
    """
    if num_nodes == ranks_per_node == 1:
        launcher = ["python"]
    else:
        nodes = ["--nnodes", str(num_nodes)] if num_nodes > 1 else []
        launcher = ["torchrun", *nodes, "--nproc-per-node", str(ranks_per_node)]
    return shlex.join([*launcher, _TRAIN, *overrides])
