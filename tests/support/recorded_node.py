"""A node of eight H100 as its kernel and ``nvidia-smi`` describe it, to be looked at without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_prolong.config.compose import compose
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor import nvidia
from nemo_prolong.doctor.facts import FabricPort, Limits, Machine, NvidiaFacts, TorchFacts, Volume
from nemo_prolong.doctor.finding import Finding
from nemo_prolong.doctor.machine import Host
from nemo_prolong.doctor.probing import ProbeError

RECORDED = Path(__file__).parents[1] / "fixtures" / "doctor" / "h100"
GIB = 2**30

TORCH = {"version": "2.10.0a0+b558c986e8.nv25.11", "cuda": "13.0", "cudnn": 91900, "nccl": [2, 28, 8], "devices": 8}
"""What torch says of itself there."""


def recorded(name: str) -> str:
    """Return what a program printed."""
    return (RECORDED / name).read_text()


@dataclass
class RecordedPrograms:
    """Runs nothing, and prints what was recorded. A text that begins with ``!`` is a failure, None no program.

    Attributes:
        outputs: Output by command; the command of torch is ``torch``.
    """

    outputs: dict[Any, str | None] = field(
        default_factory=lambda: {
            nvidia.QUERY: recorded("gpus.csv"),
            nvidia.HEADER: recorded("header.txt"),
            nvidia.LINKS: recorded("nvlink.txt"),
            nvidia.TOPOLOGY: recorded("topology.txt"),
            "torch": json.dumps(TORCH),
        }
    )

    def __call__(self, command: Sequence[str], seconds: float = 0) -> str | None:
        """Return the recorded output."""
        text = self.outputs["torch" if command[0] == sys.executable else tuple(command)]
        if text is not None and text.startswith("!"):
            raise ProbeError(text[1:])
        return text


def write_kernel_files(root: Path) -> Path:
    """Write the files of the kernel that the doctor reads: eight ports of 400 Gb/s, an NVMe for the shards."""
    for number in range(8):
        port = root / f"sys/class/infiniband/mlx5_{number}/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text("4: ACTIVE\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand\n")
    files = {
        "proc/meminfo": "MemTotal:       2113536000 kB\nMemFree:        1900000000 kB\nMemAvailable:   2040109465 kB\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05\n",
        "proc/mounts": "overlay / overlay rw 0 0\n10.0.0.2:/home /home nfs4 rw,vers=4.2 0 0\n",
        "sys/fs/cgroup/pids.max": "max\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "dev/shm").mkdir(parents=True)
    return root


def recorded_host(root: Path, programs: RecordedPrograms | None = None) -> Host:
    """Return a host that reads the recorded node."""
    return Host(write_kernel_files(root), programs or RecordedPrograms())


def h100_node(**changes: Any) -> Machine:
    """Return the facts of the recorded node; ``changes`` are fields of ``Machine`` that are otherwise."""
    _, gpus = nvidia.parse_gpus(recorded("gpus.csv"))
    active = nvidia.parse_links(recorded("nvlink.txt"))
    node = Machine(
        host="h100-01",
        python="3.12.3",
        cpus=224,
        available_memory_bytes=1900 * GIB,
        limits=Limits(1048576, 1048576, None, None),
        shared_memory=Volume("/dev/shm", 1000 * GIB, 990 * GIB, "tmpfs"),
        ports=tuple(FabricPort(f"mlx5_{n}", 1, True, "ACTIVE", 400.0, "InfiniBand") for n in range(8)),
        packages={
            "nemo-toolkit": "2.7.3",
            "megatron-core": "0.15.3",
            "torch": TORCH["version"],
            "transformer_engine": "2.9.0+70f53666",
            "apex": "0.1",
            "flash_attn": "2.7.4.post1+25.11",
        },
        requirements={"nemo-toolkit": "nemo-toolkit==2.7.3", "megatron-core": "megatron-core==0.15.3"},
        nvidia=NvidiaFacts("580.95.05", (13, 0), gpus, active),
        torch=TorchFacts(TORCH["version"], (13, 0), (9, 19, 0), (2, 28, 8), 8),
    )
    return replace(node, **changes)


def cpu_node(**changes: Any) -> Machine:
    """Return the facts of a machine without a GPU."""
    node = h100_node(nvidia=None, torch=None, ports=(), cpus=2, python="3.11.7")
    packages = {**node.packages, "torch": "2.13.0+cpu", "transformer_engine": None, "apex": None, "flash_attn": None}
    return replace(node, packages=packages, available_memory_bytes=16 * GIB, **changes)


def stage(name: str, *overrides: str) -> RunConfig:
    """Return the configuration of an experiment."""
    parent = {"stage1": ["parent=hf:models/llama3"]}.get(name, [])
    return compose(RunConfig, "train", [f"+exp={name}", *parent, *overrides])


def said(finding: Finding) -> str:
    """Return the three sentences of a finding, one a line."""
    return "\n".join([finding.what, finding.why, finding.remedy])
