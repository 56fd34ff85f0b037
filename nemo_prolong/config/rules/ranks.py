"""Rules between the configuration and the ranks that were started, or are to be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemo_prolong.config.commands import train_command
from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.rules.layout import global_batch_findings
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError

_RANKS_PER_NODE = 8
"""GPUs of a usual node, when the configuration plans none."""


def check_world(cfg: RunConfig, world_size: int, overrides: Sequence[str] = ()) -> None:
    """Check that the ranks that were started can hold the layout and share the global batch.

    Args:
        cfg: A checked configuration.
        world_size: Ranks that were started.
        overrides: What was typed, for the command in the remedy.

    Raises:
        ConfigError: If TP x PP x CP does not divide ``world_size``, or the global batch does not divide over DP.
    """
    ranks = "rank was" if world_size == 1 else "ranks were"
    _check_world(cfg, world_size, overrides, f"{world_size} {ranks} started")


def ranks_to_start(cfg: RunConfig, gpus: int, overrides: Sequence[str] = ()) -> int:
    """Return how many ranks a process that no launcher started is to start on this machine.

    It is one for each GPU, and ``parallelism.ranks_per_node`` on a CPU. Fewer are started than there are GPUs where
    the configuration plans fewer. A plan of one rank, for a layout of one, is one rank.

    Args:
        cfg: A checked configuration.
        gpus: GPUs that this process sees.
        overrides: What was typed, for the command in the remedy.

    Raises:
        ConfigError: If this machine has fewer GPUs than planned or than the layout needs, or several machines are
            planned.
    """
    parallelism = cfg.parallelism
    planned = parallelism.ranks_per_node
    if parallelism.planned_world_size == 1 == parallelism.model_parallel_size:
        return 1
    ranks = planned if planned > 1 or not gpus else gpus
    if gpus:
        available = min(ranks, gpus)
        _check_world(cfg, available, overrides, f"this machine has {gpus} GPU{'' if gpus == 1 else 's'}")
    else:
        check_world(cfg, ranks, overrides)
    if parallelism.num_nodes > 1:
        raise ConfigError(
            f"parallelism.num_nodes={parallelism.num_nodes}",
            "several machines are planned, and this command was started on one without a launcher.",
            f"Start it on each with: {_command_for(cfg, overrides)}, or set parallelism.num_nodes=1.",
        )
    if gpus and gpus < ranks:
        raise ConfigError(
            f"parallelism.ranks_per_node={planned}",
            f"is planned, and this machine has {gpus} GPU{'' if gpus == 1 else 's'}.",
            f"Set parallelism.ranks_per_node={gpus}, or repair the machine.",
        )
    return ranks


def _check_world(cfg: RunConfig, world_size: int, overrides: Sequence[str], found: str) -> None:
    parallelism = cfg.parallelism
    needed = parallelism.model_parallel_size
    if world_size % needed:
        degrees = (
            f"TP {parallelism.tensor_model_parallel_size} x PP {parallelism.pipeline_model_parallel_size} "
            f"x CP {parallelism.context_parallel_size}"
        )
        raise ConfigError(
            f"parallelism={degrees}",
            f"needs a multiple of {needed} ranks, and {found}.",
            f"Start it with: {_command_for(cfg, overrides)}",
        )
    raise_all(global_batch_findings(cfg, world_size))


def _command_for(cfg: RunConfig, overrides: Sequence[str]) -> str:
    parallelism, needed = cfg.parallelism, cfg.parallelism.model_parallel_size
    if parallelism.planned_world_size % needed == 0:
        return train_command(overrides, parallelism.ranks_per_node, parallelism.num_nodes)
    num_nodes = math.ceil(needed / _RANKS_PER_NODE)
    return train_command(overrides, math.ceil(needed / num_nodes), num_nodes)
