"""What Lightning asks about ranks, answered from the variables that the launcher set."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment

from nemo_prolong.distributed.rank_environment import RankEnvironment


class LaunchedRank(ClusterEnvironment):
    """The place of this rank, whatever the launcher.

    Lightning would choose by what it finds. Inside a Slurm job it takes the numbers of the job, also for ranks that
    torchrun or this package started there, and requeues the job by itself on SIGUSR1.

    Args:
        place: Of this rank.
    """

    def __init__(self, place: RankEnvironment) -> None:
        super().__init__()
        self._place = place

    @property
    def creates_processes_externally(self) -> bool:
        """Return that Lightning is to start none."""
        return True

    @property
    def main_address(self) -> str:
        """Return where rank 0 can be reached."""
        return self._place.master_address

    @property
    def main_port(self) -> int:
        """Return the port of rank 0."""
        return self._place.master_port

    @staticmethod
    def detect() -> bool:
        """Return that this is only used where it is given."""
        return False

    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._place.world_size

    def set_world_size(self, size: int) -> None:
        """Leave it as the launcher set it."""

    def global_rank(self) -> int:
        """Return this rank."""
        return self._place.rank

    def set_global_rank(self, rank: int) -> None:
        """Leave it as the launcher set it."""

    def local_rank(self) -> int:
        """Return the number of this rank on its machine."""
        return self._place.local_rank

    def node_rank(self) -> int:
        """Return the number of this machine."""
        return self._place.node_rank
