"""Reading a node: files of the kernel, limits, room on disks, the driver. Each part is a probe of its own."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_prolong.doctor import nvidia, software
from nemo_prolong.doctor.facts import FabricPort, Limits, Machine, Volume
from nemo_prolong.doctor.finding import Finding
from nemo_prolong.doctor.nvidia import RunCommand
from nemo_prolong.doctor.probing import Probe, run_command, values
from nemo_prolong.doctor.software import Packages

_NO_LIMITS = Limits(None, None, None, None)
_NO_PACKAGES = Packages({}, {})


@dataclass(frozen=True)
class Host:
    """Where a node is read. Tests give another root and recorded programs.

    Attributes:
        root: Directory that ``/proc``, ``/sys`` and ``/dev`` are below.
        run: Runs a program.
    """

    root: Path = Path("/")
    run: RunCommand = run_command

    def probes(self) -> list[Probe[Any]]:
        """Start reading everything at once."""
        probes: list[Probe[Any]] = [
            Probe("gpus", "nvidia-smi", partial(nvidia.read_driver, self.run)),
            # GPUs without NVLink, and some containers, do not answer these.
            Probe("nvlink", "nvidia-smi nvlink --status", lambda: self.run(nvidia.LINKS), vital=False),
            Probe("topology", "nvidia-smi topo -m", lambda: self.run(nvidia.TOPOLOGY), vital=False),
            Probe("fabric", "/sys/class/infiniband", partial(read_ports, self.root)),
            Probe("limits", "the limits of this process", partial(read_limits, self.root)),
            Probe("shared_memory", "the file system of shared memory", partial(read_shared_memory, self.root)),
            Probe("memory", "/proc/meminfo", partial(read_available_memory, self.root)),
            Probe("packages", "the list of installed packages", software.read_packages),
        ]
        if (self.root / "proc/driver/nvidia/version").exists():
            probes.append(Probe("torch", "torch with CUDA", partial(software.ask_torch, self.run)))
        return probes


def read_machine(probes: list[Probe[Any]], deadline: float) -> tuple[Machine, list[Finding]]:
    """Return what is known of the node by a deadline, and a finding for each part that gave no answer.

    Args:
        probes: Of ``Host.probes``.
        deadline: A time of ``time.monotonic``.
    """
    known, problems = values(probes, deadline)
    driver = known["gpus"]
    if driver is not None:
        active = nvidia.parse_links(known["nvlink"] or "")
        slow_pairs = nvidia.parse_slow_pairs(known["topology"] or "")
        driver = replace(driver, active_links=active, slow_pairs=slow_pairs)
    packages = known["packages"] or _NO_PACKAGES
    machine = Machine(
        host=socket.gethostname(),
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        available_memory_bytes=known["memory"],
        limits=known["limits"] or _NO_LIMITS,
        shared_memory=known["shared_memory"],
        ports=known["fabric"] or (),
        packages=packages.versions,
        requirements=packages.requirements,
        nvidia=driver,
        torch=known.get("torch"),
    )
    return machine, problems


def read_ports(root: Path) -> tuple[FabricPort, ...]:
    """Return the ports of InfiniBand and RoCE adapters, none where there is no adapter."""
    found = []
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        state = _text(port / "state").partition(":")[2].strip()
        rate = re.match(r"[\d.]+", _text(port / "rate"))
        found.append(
            FabricPort(
                device=port.parents[1].name,
                port=int(port.name),
                active=state == "ACTIVE",
                state=state or "unknown",
                gigabits_per_second=float(rate[0]) if rate else None,
                link_layer=_text(port / "link_layer"),
            )
        )
    return tuple(found)


def read_limits(root: Path) -> Limits:
    """Return the limits of this process and of its control group."""
    soft, hard = map(_limit, resource.getrlimit(resource.RLIMIT_NOFILE))
    locked = _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    processes = _limit(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    group = _text(root / "sys/fs/cgroup/pids.max")
    known = [count for count in (processes, int(group) if group.isdecimal() else None) if count is not None]
    return Limits(soft, hard, locked, min(known, default=None))


def read_shared_memory(root: Path) -> Volume | None:
    """Return the room in ``/dev/shm``, None where there is none."""
    path = root / "dev/shm"
    return read_volume(str(path), root) if path.is_dir() else None


def read_available_memory(root: Path) -> int | None:
    """Return the host memory in bytes that programs can have, which the control group may limit."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    most = _text(root / "sys/fs/cgroup/memory.max")
    known = [int(match[1]) * 1024] if match else []
    return min([*known, int(most)] if most.isdecimal() else known, default=None)


def read_volume(path: str, root: Path = Path("/")) -> Volume:
    """Return the room where a path lies, or will lie when it is made.

    Raises:
        OSError: If the file system does not answer.
    """
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    status = os.statvfs(place)
    return Volume(
        path=path,
        total_bytes=status.f_blocks * status.f_frsize,
        free_bytes=status.f_bavail * status.f_frsize,
        kind=_filesystem_kind(place.resolve(), root),
        writable=os.access(place, os.W_OK | os.X_OK),
    )


def _filesystem_kind(place: Path, root: Path) -> str:
    """Return the type of the file system that is mounted over a path last."""
    kind, longest = "", -1
    for line in _text(root / "proc/mounts").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = Path(fields[1].replace("\\040", " "))
        if place.is_relative_to(mount) and len(mount.parts) >= longest:
            kind, longest = fields[2], len(mount.parts)
    return kind


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
