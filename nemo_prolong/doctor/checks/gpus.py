"""The GPUs of a node, their driver, and the links between them."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor import needs
from nemo_prolong.doctor.facts import Gpu, Machine, NvidiaFacts
from nemo_prolong.doctor.finding import Finding, good, no_go, warning
from nemo_prolong.text import counted
from nemo_prolong.units import format_bytes

_H100_BYTES = 79 * 2**30
"""Less than what the driver reports for an H100 with 80 GB (81,559 MiB), and more than what smaller GPUs have."""

_FIRST_DRIVERS = {12: "525.60.13", 13: "580.65.06"}
"""First Linux driver of each major release of CUDA, by NVIDIA's table of CUDA's compatibility."""


def gpu_findings(machine: Machine, cfg: RunConfig | None) -> list[Finding]:
    """Return what the GPUs of a node mean for a stage, or for anyone where there is none.

    Args:
        machine: The node.
        cfg: The stage, or None to look at the machine alone.
    """
    wanted = cfg.parallelism.ranks_per_node if cfg is not None and needs.needs_gpus(cfg) else 0
    if not machine.gpus:
        return [_no_gpu(machine, wanted)]
    found = [_count(machine.gpus, wanted, cfg)]
    for check in (_mixed, _divided, _memory_errors, _occupied, _small, _exclusive, _not_persistent):
        found += check(machine.gpus)
    assert machine.nvidia is not None, "it has the GPUs"
    return [*found, *_driver(machine, machine.nvidia), *_links(machine.nvidia, cfg)]


def _no_gpu(machine: Machine, wanted: int) -> Finding:
    there = "nvidia-smi lists no GPU" if machine.nvidia else "there is no NVIDIA driver (no nvidia-smi)"
    if not wanted:
        return good("gpus", f"{there}; the CPU runs stages with torch's kernels.")
    return no_go(
        "gpus",
        f"{there}, and the stage is planned for {counted(wanted, 'GPU')} on each node.",
        "Its kernels run on GPUs only, and its model does not fit elsewhere.",
        "Start the doctor on a GPU node (srun, kubectl exec), give the container its GPUs (docker run --gpus all), or "
        "try the recipe in miniature: +exp=mini/base.",
    )


def _count(gpus: tuple[Gpu, ...], wanted: int, cfg: RunConfig | None) -> Finding:
    names = ", ".join(dict.fromkeys(gpu.name for gpu in gpus))
    here = f"{counted(len(gpus), 'GPU')} here ({names})"
    if cfg is None or len(gpus) >= wanted:
        return good("gpus", f"{here}.")
    return no_go(
        "gpus",
        f"{here}, and parallelism.ranks_per_node={wanted}.",
        "Each rank takes a GPU of its own; ranks without one fail when they start.",
        f"Ask the job for {wanted} GPUs a node, or choose a layout for {len(gpus)}: parallelism.ranks_per_node="
        f"{len(gpus)}. nvidia-smi -L on the node shows whether one has dropped off the bus.",
    )


def _mixed(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    kinds = dict.fromkeys((gpu.name, gpu.memory_bytes) for gpu in gpus)
    if len(kinds) > 1:
        names = " and ".join(f"{name} ({format_bytes(size)})" for name, size in kinds)
        yield warning(
            "gpu_kinds",
            f"the node has GPUs of several kinds: {names}.",
            "Every step waits for the slowest of them, and the smallest decides what fits.",
            "Use nodes of one kind, or hide the others with CUDA_VISIBLE_DEVICES.",
        )


def _divided(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    divided = [gpu for gpu in gpus if gpu.mig]
    if divided:
        yield no_go(
            "mig",
            f"{_named(divided)} divided into MIG instances.",
            "NCCL does not join instances, and an instance has a part of the memory.",
            f"Have the administrator switch MIG off: nvidia-smi -i {divided[0].index} -mig 0.",
        )


def _memory_errors(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    broken = [gpu for gpu in gpus if gpu.uncorrected_errors]
    if broken:
        yield no_go(
            "gpu_memory_errors",
            f"{_named(broken)} reporting memory errors that ECC could not correct "
            f"({', '.join(str(gpu.uncorrected_errors) for gpu in broken)}).",
            "The next such error ends the run with an XID, as a rule within hours.",
            "Leave the node out (sbatch --exclude) and have the GPU reset or replaced.",
        )


def _occupied(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    busy = [gpu for gpu in gpus if needs.is_busy(gpu.used_bytes)]
    if busy:
        used = ", ".join(format_bytes(gpu.used_bytes) for gpu in busy)
        yield warning(
            "gpu_memory_used",
            f"{_named(busy)} in use by another process ({used}).",
            "What others hold is missing in training, which then runs out of memory, and both are slow.",
            "End what a former job has left (nvidia-smi lists the processes), or ask for nodes of your own.",
        )


def _small(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    small = [gpu for gpu in gpus if gpu.memory_bytes < _H100_BYTES]
    if small:
        yield warning(
            "gpu_memory",
            f"{_named(small)} smaller than 80 GB ({format_bytes(small[0].memory_bytes)}).",
            "The layouts of the recipe are made for H100 with 80 GB.",
            "Raise the degrees of tensor or context parallelism, or recompute more (precision.recompute).",
        )


def _exclusive(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    closed = [gpu for gpu in gpus if gpu.compute_mode == "Prohibited"]
    if closed:
        yield no_go(
            "compute_mode",
            f"{_named(closed)} in compute mode Prohibited.",
            "No process may compute there.",
            f"Have the administrator set it: nvidia-smi -i {closed[0].index} -c DEFAULT.",
        )


def _not_persistent(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    lazy = [gpu for gpu in gpus if gpu.persistent is False]
    if lazy:
        yield warning(
            "persistence",
            f"{_named(lazy)} without persistence mode.",
            "The driver is loaded anew for every program, which costs seconds at each start and forgets error counts.",
            "Have the administrator run nvidia-persistenced.",
        )


def _driver(machine: Machine, driver: NvidiaFacts) -> Iterator[Finding]:
    torch = machine.torch
    if torch is None:
        yield good("driver", f"driver {driver.driver}{_of_cuda(driver)}.")
        return
    if torch.cuda is not None and driver.cuda is not None and torch.cuda[0] > driver.cuda[0]:
        first = _FIRST_DRIVERS.get(torch.cuda[0])
        yield no_go(
            "driver",
            f"driver {driver.driver} takes CUDA {_dotted(driver.cuda)}, torch is built for CUDA {_dotted(torch.cuda)}.",
            "Kernels of a newer major release do not load.",
            f"Use a driver from {first or 'that release'} on, or an image of CUDA {driver.cuda[0]}.",
        )
    elif torch.devices == 0:
        yield no_go(
            "driver",
            f"driver {driver.driver} lists {counted(len(driver.gpus), 'GPU')}, and torch can use none of them.",
            "Training would start on the CPU, or not at all.",
            "Install a CUDA build of torch, and on NVSwitch nodes see that nvidia-fabricmanager runs (systemctl status "
            "nvidia-fabricmanager): CUDA error 802 means that it does not.",
        )
    else:
        yield good("driver", f"driver {driver.driver}{_of_cuda(driver)}, torch uses {counted(torch.devices, 'GPU')}.")


def _links(driver: NvidiaFacts, cfg: RunConfig | None) -> Iterator[Finding]:
    if len(driver.gpus) < 2:
        return
    # Links that are down on every GPU are not wired: PCIe cards list theirs so.
    most = max(driver.active_links.values(), default=0)
    fewer = {gpu: count for gpu, count in driver.active_links.items() if count < most}
    if fewer:
        parts = ", ".join(f"GPU {gpu} has {count} of {most} links" for gpu, count in fewer.items())
        yield no_go(
            "nvlink",
            f"NVLink is not whole: {parts}.",
            "NCCL goes around the GPU or fails, and every rank waits for it.",
            "Leave the node out and have the GPU reset (nvidia-smi nvlink --errorcounters shows why).",
        )
    if driver.slow_pairs:
        yield _slow(driver, cfg)
    elif not fewer:
        yield good("nvlink", f"{len(driver.gpus)} GPUs joined by NVLink, {counted(most, 'link')} each.")


def _slow(driver: NvidiaFacts, cfg: RunConfig | None) -> Finding:
    (first, second), way = next(iter(driver.slow_pairs.items()))
    pairs = len(driver.gpus) * (len(driver.gpus) - 1) // 2
    what = f"{len(driver.slow_pairs)} of {pairs} pairs of GPUs have no NVLink (GPU {first} to GPU {second} by {way})."
    why = "Data between them goes over PCIe, about a tenth as fast as NVLink."
    if cfg is not None and cfg.parallelism.tensor_model_parallel_size > 1:
        tp = cfg.parallelism.tensor_model_parallel_size
        why = f"TP {tp} exchanges every layer's activations over PCIe, about a tenth as fast as NVLink."
    return warning(
        "nvlink",
        what,
        why,
        "Use SXM nodes, or keep tensor parallelism within GPUs that are joined (nvidia-smi topo -m).",
    )


def _named(gpus: list[Gpu]) -> str:
    numbers = ", ".join(str(gpu.index) for gpu in gpus)
    return f"GPU {numbers} is" if len(gpus) == 1 else f"GPUs {numbers} are"


def _of_cuda(driver: NvidiaFacts) -> str:
    return f" for CUDA {_dotted(driver.cuda)}" if driver.cuda else ""


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
