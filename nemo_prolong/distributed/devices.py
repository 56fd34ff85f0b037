"""How many GPUs this process sees."""

from __future__ import annotations

from pathlib import Path

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
