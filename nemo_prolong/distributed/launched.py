"""What started this process: torchrun, srun, or nobody. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.distributed.slurm_step import slurm_rank
from nemo_prolong.errors import ConfigError


def take_place(environment: MutableMapping[str, str] = os.environ) -> RankEnvironment | None:
    """Find which rank the launcher made this process, and set torchrun's variables where srun was the launcher.

    torchrun goes first, because it may be started by srun, one task a node.

    Returns:
        The place of this rank, or None where no launcher started it as one of several.

    Raises:
        ConfigError: If the variables of the launcher are incomplete or contradict each other.
    """
    place = RankEnvironment.given(environment)
    if place is None and (place := slurm_rank(environment)) is not None:
        environment.update(place.variables())
    return place


def refuse_several_ranks(script: str) -> None:
    """Refuse to run a script in several processes that would all do the same.

    Args:
        script: Its path, e.g. ``scripts/export.py``.

    Raises:
        ConfigError: On every rank, if torchrun or srun started more than one.
    """
    place = take_place()
    if place is not None and place.world_size > 1:
        raise ConfigError(
            script,
            f"is one process, and {place.world_size} were started.",
            f"Start it without torchrun: python {script}. Under Slurm, start one task: srun --nodes=1 --ntasks=1.",
        )
