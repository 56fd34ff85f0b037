"""Which rank this process is: the variables of torchrun, which every launcher's are turned into. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_prolong.errors import ConfigError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun gives every rank, and what torch, Lightning, NeMo and this package read."""


@dataclass(frozen=True)
class RankEnvironment:
    """The place of one rank among all.

    Attributes:
        rank: Number of this rank, from 0.
        local_rank: Number of this rank on its machine, from 0. It is the index of its GPU.
        world_size: Ranks on all machines.
        local_world_size: Ranks on each machine. It is the same on all.
        master_address: Where rank 0 can be reached.
        master_port: The port that rank 0 listens at.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = 0

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return self.world_size // self.local_world_size

    @property
    def node_rank(self) -> int:
        """Number of this machine, from 0."""
        return self.rank // self.local_world_size

    def variables(self) -> dict[str, str]:
        """Return the variables of torchrun that say this."""
        values = (
            self.rank,
            self.local_rank,
            self.world_size,
            self.local_world_size,
            self.master_address,
            self.master_port,
        )
        return {name: str(value) for name, value in zip(VARIABLES, values, strict=True)}

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> RankEnvironment:
        """Return what the variables of torchrun say; one rank alone where they are not set.

        Raises:
            ConfigError: If some of them are missing, are no numbers or contradict each other.
        """
        return cls.given(environment) or cls()

    @classmethod
    def given(cls, environment: Mapping[str, str] = os.environ) -> RankEnvironment | None:
        """Return what the variables of torchrun say, or None where no launcher set them.

        Raises:
            ConfigError: As ``current``.
        """
        missing = [name for name in VARIABLES if not environment.get(name)]
        if "WORLD_SIZE" in missing and "RANK" in missing:
            return None
        if missing and number(environment, "WORLD_SIZE", 1) == 1 and number(environment, "RANK", 0) == 0:
            # A platform may say that a container is the only one. How many ranks it holds nobody has decided.
            return None
        if missing:
            given = [f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)]
            raise ConfigError(
                " ".join(given),
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
                "Start the ranks by torchrun or srun, which set or replace all of them, or set all of them.",
            )
        place = cls(
            rank=number(environment, "RANK"),
            local_rank=number(environment, "LOCAL_RANK"),
            world_size=number(environment, "WORLD_SIZE"),
            local_world_size=number(environment, "LOCAL_WORLD_SIZE"),
            master_address=environment["MASTER_ADDR"],
            master_port=number(environment, "MASTER_PORT"),
        )
        if not place.is_consistent():
            raise ConfigError(
                " ".join(f"{name}={environment[name]}" for name in VARIABLES[:4]),
                "every machine must have as many ranks, numbered in the order of the machines.",
                "Start as many ranks on every machine, or unset these variables.",
            )
        return place

    def is_consistent(self) -> bool:
        """Return whether machines have equally many ranks, and this one the number that its machine has for it."""
        return (
            0 <= self.local_rank < self.local_world_size
            and 0 <= self.rank < self.world_size
            and self.world_size % self.local_world_size == 0
            and self.rank % self.local_world_size == self.local_rank
        )


def number(environment: Mapping[str, str], name: str, missing: int | None = None) -> int:
    """Return a variable as a number that is not negative.

    Args:
        environment: Variables.
        name: Which.
        missing: What an absent or empty one is.

    Raises:
        ConfigError: If it is no such number.
    """
    text = environment.get(name) or ""
    if not text and missing is not None:
        return missing
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"{name}={text}", "is not a whole number.", "Leave it to the launcher (torchrun or srun), or unset it."
        )
    return int(text)


def rank_and_size() -> tuple[int, int]:
    """Return this rank and the number of ranks, before there are process groups."""
    place = RankEnvironment.current()
    return place.rank, place.world_size
