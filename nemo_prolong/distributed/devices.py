"""The GPUs that this process sees."""

from __future__ import annotations

from pathlib import Path

from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.errors import ConfigError

_DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them exists where a driver of NVIDIA is reachable, on Linux and in the Linux of Windows."""


def visible_gpus() -> int:
    """Return the GPUs that torch would use here. Torch is imported only where there is a driver.

    No CUDA context is made, so processes that are started later have all of the memory.
    """
    if not any(path.exists() for path in _DRIVER_FILES):
        return 0
    import torch

    return torch.cuda.device_count()


def check_devices(place: RankEnvironment) -> None:
    """Refuse a rank that does not see a GPU for each rank of its machine. On a CPU there is nothing to check.

    Raises:
        ConfigError: If it sees some and too few.
    """
    gpus = visible_gpus()
    if 0 < gpus < place.local_world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={place.local_world_size}",
            f"rank {place.rank} sees {gpus} GPU{'' if gpus == 1 else 's'}, and every rank of a machine takes the one "
            "with its own number.",
            f"Let every rank see all of them. Under srun, ask for --gpus-per-node={place.local_world_size}, without "
            "--gpus-per-task and --gpu-bind.",
        )
