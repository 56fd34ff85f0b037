"""What the operating system gives a stage: shared memory, limits, processors, host memory, adapters between nodes."""

from __future__ import annotations

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor import needs
from nemo_prolong.doctor.facts import FabricPort, Limits, Machine
from nemo_prolong.doctor.finding import Finding, good, no_go, warning
from nemo_prolong.text import counted
from nemo_prolong.units import format_bytes

_DOCKER_SHARED_BYTES = 64 * 2**20
"""What Docker gives ``/dev/shm`` where nobody asks for more."""

_USUAL_OPEN_FILES = 4096
_USUAL_PROCESSES = 4096
"""What programs of this kind take on a node, where no stage says more."""


def system_findings(machine: Machine, cfg: RunConfig | None, ranks_here: int = 1) -> list[Finding]:
    """Return what the operating system of a node means for a stage.

    Args:
        machine: The node.
        cfg: The stage, or None to look at the machine alone.
        ranks_here: Ranks that a launcher has started on this node. Slurm may give each its own processors.
    """
    found = [_shared_memory(machine, cfg), *_limits(machine.limits, machine, cfg), _cpus(machine, cfg, ranks_here)]
    if cfg is not None:
        found += _host_memory(machine, cfg)
    return [*found, *_fabric(machine, cfg)]


def _shared_memory(machine: Machine, cfg: RunConfig | None) -> Finding:
    needed = needs.shared_memory_bytes(cfg) if cfg is not None else 0
    volume = machine.shared_memory
    remedy = "Start the container with --ipc=host or --shm-size=64g; in Kubernetes mount an emptyDir of medium Memory."
    why = "Loader processes hand over rows there, and NCCL its buffers; a full one ends them with SIGBUS."
    if volume is None:
        return no_go("shared_memory", "there is no /dev/shm.", why, remedy)
    room = f"{volume.path} has {format_bytes(volume.free_bytes)} free of {format_bytes(volume.total_bytes)}"
    if volume.free_bytes < needed:
        return no_go("shared_memory", f"{room}, the stage takes up to {format_bytes(needed)}.", why, remedy)
    if volume.total_bytes <= _DOCKER_SHARED_BYTES:
        return warning("shared_memory", f"{room}, which is Docker's default.", why, remedy)
    return good("shared_memory", f"{room}.")


def _limits(limits: Limits, machine: Machine, cfg: RunConfig | None) -> list[Finding]:
    files = max(needs.open_files(cfg) if cfg is not None else 0, _USUAL_OPEN_FILES)
    threads = max(needs.processes(cfg) if cfg is not None else 0, _USUAL_PROCESSES)
    found = []
    if limits.open_files is not None and limits.open_files < files:
        hard = "" if limits.open_files_hard is None else f" (it may be raised to {limits.open_files_hard})"
        found.append(
            warning(
                "open_files",
                f"ulimit -n is {limits.open_files}{hard}, and up to {files} files and sockets are open.",
                "Shards, sockets of ranks and log files then fail with: Too many open files.",
                f"Put ulimit -n {files} into the job, or start the container with --ulimit nofile={files}.",
            )
        )
    if limits.processes is not None and limits.processes < threads:
        found.append(
            warning(
                "processes",
                f"{limits.processes} processes and threads are allowed, and the node starts up to {threads}.",
                "Loader processes and the threads of CUDA and NCCL then fail with: Resource temporarily unavailable.",
                f"Put ulimit -u {threads} into the job, or start the container with --pids-limit={threads}.",
            )
        )
    if any(port.active for port in machine.ports) and limits.locked_bytes is not None:
        found.append(_locked_memory(limits.locked_bytes, cfg))
    return found or [good("limits", "limits of files, processes and locked memory are high enough.")]


def _locked_memory(locked_bytes: int, cfg: RunConfig | None) -> Finding:
    what = f"ulimit -l is {format_bytes(locked_bytes)}, and this node has InfiniBand or RoCE."
    why = "NCCL locks its buffers for the adapter, and fails with: ibv_reg_mr failed, or: Cannot allocate memory."
    remedy = "Start the container with --ulimit memlock=-1, or set PropagateResourceLimitsExcept=MEMLOCK in slurm.conf."
    level = no_go if cfg is not None and cfg.parallelism.num_nodes > 1 else warning
    return level("locked_memory", what, why, remedy)


def _cpus(machine: Machine, cfg: RunConfig | None, ranks_here: int) -> Finding:
    here = f"{counted(machine.cpus, 'processor')} for this process"
    if cfg is None:
        return good("cpus", f"{here}.")
    needed = needs.cpus(cfg) if ranks_here == 1 else 1 + cfg.data.num_workers
    if machine.cpus >= needed:
        return good("cpus", f"{here}.")
    of = "each node's ranks and their loader processes" if ranks_here == 1 else "each rank and its loader processes"
    return warning(
        "cpus",
        f"{here}, and {of} are {needed}.",
        "Steps then wait for rows and for kernels that are launched late.",
        "Ask for more: srun --cpus-per-task, docker run --cpus, resources.requests.cpu; or lower data.num_workers.",
    )


def _host_memory(machine: Machine, cfg: RunConfig) -> list[Finding]:
    needed, available = needs.save_memory_bytes(cfg), machine.available_memory_bytes
    if not needed or available is None:
        return []
    room = f"{format_bytes(available)} of host memory are available"
    if available >= needed:
        return [good("host_memory", f"{room}; a save in the background takes {format_bytes(needed)}.")]
    return [
        no_go(
            "host_memory",
            f"{room}, and a save in the background takes {format_bytes(needed)} on each node.",
            "The kernel ends a rank at the first save.",
            "Ask for the node's memory (srun --mem=0, resources.requests.memory), or set checkpoint.async_save=false.",
        )
    ]


def _fabric(machine: Machine, cfg: RunConfig | None) -> list[Finding]:
    several = cfg is not None and cfg.parallelism.num_nodes > 1
    active = [port for port in machine.ports if port.active]
    down = [port for port in machine.ports if not port.active]
    found = []
    if not active and several:
        found.append(
            warning(
                "fabric",
                "no InfiniBand or RoCE port is active." if down else "there is no InfiniBand or RoCE adapter.",
                "NCCL then talks TCP between nodes, ten times slower or worse: context parallelism across nodes waits.",
                "Mount /dev/infiniband into the container, use nodes with a fabric, or your cloud's plugin of NCCL.",
            )
        )
    elif not active:
        found.append(good("fabric", "no InfiniBand or RoCE port is active; one node needs none."))
    if down and several:
        names = ", ".join(f"{port.device}:{port.port} ({port.state})" for port in down)
        found.append(
            warning(
                "fabric_ports",
                f"{counted(len(down), 'port')} of {len(machine.ports)} not active: {names}.",
                "Ranks of this node share the others, so the whole job is slower.",
                "Have them looked at (ibstat), or name the good ones in NCCL_IB_HCA.",
            )
        )
    return [*found, good("fabric", f"{_rates(active)}.")] if active else found


def _rates(ports: list[FabricPort]) -> str:
    kinds = dict.fromkeys((port.gigabits_per_second, port.link_layer) for port in ports)
    rates = ", ".join(f"{rate:g} Gb/s {layer}" if rate else layer for rate, layer in kinds)
    return f"{counted(len(ports), 'port')} active ({rates})"
