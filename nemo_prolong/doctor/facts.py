"""What is known of a machine, as plain values: the input of every check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it. None stands for what the driver does not say.

    Attributes:
        index: Its number.
        name: Such as ``NVIDIA H100 80GB HBM3``.
        memory_bytes: All of its memory.
        used_bytes: Memory that some process holds.
        compute_capability: (9, 0) for Hopper.
        persistent: Whether the driver stays loaded between programs.
        mig: Whether it is divided into instances.
        uncorrected_errors: Memory errors since the driver was loaded that ECC could not correct.
        compute_mode: ``Default`` lets several processes use it.
    """

    index: int
    name: str
    memory_bytes: int
    used_bytes: int
    compute_capability: tuple[int, ...]
    persistent: bool | None
    mig: bool
    uncorrected_errors: int | None
    compute_mode: str


@dataclass(frozen=True)
class NvidiaFacts:
    """The driver and what it drives.

    Attributes:
        driver: Its release.
        cuda: Newest CUDA release that the driver takes.
        gpus: In the order of their numbers.
        active_links: NVLinks of each GPU that are up.
        slow_pairs: Pairs of GPUs that are not joined by NVLink, with the way between them (``SYS``, ``PHB``, ...).
    """

    driver: str
    cuda: tuple[int, ...] | None
    gpus: tuple[Gpu, ...]
    active_links: Mapping[int, int] = field(default_factory=dict)
    slow_pairs: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class FabricPort:
    """One port of an InfiniBand or RoCE adapter.

    Attributes:
        device: Such as ``mlx5_0``.
        port: Its number.
        active: Whether it carries traffic.
        state: In the words of the kernel, such as ``ACTIVE``.
        gigabits_per_second: Its rate; None where the kernel does not say.
        link_layer: ``InfiniBand`` or ``Ethernet``.
    """

    device: str
    port: int
    active: bool
    state: str
    gigabits_per_second: float | None
    link_layer: str


@dataclass(frozen=True)
class Limits:
    """Limits of this process; None is no limit.

    Attributes:
        open_files: Soft limit (``ulimit -n``).
        open_files_hard: What it may be raised to.
        locked_bytes: Memory that may be locked (``ulimit -l``).
        processes: Processes and threads, by ``ulimit -u`` and by the control group; the smaller one.
    """

    open_files: int | None
    open_files_hard: int | None
    locked_bytes: int | None
    processes: int | None


@dataclass(frozen=True)
class Volume:
    """Room on the file system of a path.

    Attributes:
        path: The path that was asked for.
        total_bytes: Size of the file system.
        free_bytes: What this user may still write; quotas are not seen.
        kind: Type of the file system, such as ``nfs4``; empty where it is not known.
        writable: Whether the path, or the nearest directory above it that exists, may be written.
    """

    path: str
    total_bytes: int
    free_bytes: int
    kind: str = ""
    writable: bool = True


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of the libraries it loads. It is asked in a process of its own, where there is a GPU.

    Attributes:
        version: Of torch.
        cuda: CUDA release that it was built for.
        cudnn: Of the library that is loaded.
        nccl: Of the library that is loaded.
        devices: GPUs that it can use.
    """

    version: str
    cuda: tuple[int, ...] | None
    cudnn: tuple[int, ...] | None
    nccl: tuple[int, ...] | None
    devices: int


@dataclass(frozen=True)
class Machine:
    """One node.

    Attributes:
        host: Its name.
        python: Release of the interpreter.
        cpus: Processors that this process may use.
        available_memory_bytes: Host memory that programs can have; None where it is not known.
        limits: Limits of this process.
        shared_memory: ``/dev/shm``; None where there is none.
        ports: Of InfiniBand and RoCE.
        packages: Installed version of each package that is looked at, None where it is not installed.
        requirements: What this package asks for, by the name of each package that it asks for.
        nvidia: The driver and its GPUs; None without a driver.
        torch: What torch says; None without a GPU, or without torch.
    """

    host: str
    python: str
    cpus: int
    available_memory_bytes: int | None
    limits: Limits
    shared_memory: Volume | None
    ports: tuple[FabricPort, ...]
    packages: Mapping[str, str | None]
    requirements: Mapping[str, str]
    nvidia: NvidiaFacts | None
    torch: TorchFacts | None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs, none without a driver."""
        return self.nvidia.gpus if self.nvidia else ()
