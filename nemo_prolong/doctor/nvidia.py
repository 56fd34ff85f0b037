"""What ``nvidia-smi`` prints, read into facts. The program exists wherever the driver does, in containers too."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nemo_prolong.doctor.facts import Gpu, NvidiaFacts
from nemo_prolong.doctor.probing import ProbeError

QUERY_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "compute_cap",
    "persistence_mode",
    "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "compute_mode",
)
"""Columns of the GPU table. All of them exist in the drivers that Hopper needs (R525 and later)."""

QUERY = ("nvidia-smi", f"--query-gpu={','.join(QUERY_FIELDS)}", "--format=csv,noheader,nounits")
HEADER = ("nvidia-smi", "-q", "-d", "COMPUTE")
TOPOLOGY = ("nvidia-smi", "topo", "-m")
LINKS = ("nvidia-smi", "nvlink", "--status")

_MIB = 2**20
_ABSENT = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]")
_CELL = re.compile(r"NV\d+|SYS|NODE|PHB|PXB|PIX|X")

RunCommand = Callable[[Sequence[str]], str | None]
"""Returns what a program prints, None where it does not exist; raises ProbeError where it fails."""


def read_driver(run: RunCommand) -> NvidiaFacts | None:
    """Return driver and GPUs, or None where there is no ``nvidia-smi``.

    Raises:
        ProbeError: If the program fails, or prints what nobody expects.
    """
    table = run(QUERY)
    if table is None:
        return None
    drivers, gpus = parse_gpus(table)
    return NvidiaFacts(driver=drivers[0] if drivers else "", cuda=parse_driver_cuda(run(HEADER) or ""), gpus=gpus)


def parse_gpus(table: str) -> tuple[list[str], tuple[Gpu, ...]]:
    """Return the driver's release by GPU, and the GPUs, of what ``QUERY`` prints.

    Raises:
        ProbeError: If a line has other columns.
    """
    drivers, gpus = [], []
    for line in filter(str.strip, table.splitlines()):
        cells = [cell.strip() for cell in line.split(", ")]
        if len(cells) != len(QUERY_FIELDS):
            raise ProbeError(f"nvidia-smi prints {line.strip()!r} for a GPU")
        row = dict(zip(QUERY_FIELDS, cells, strict=True))
        drivers.append(row["driver_version"])
        gpus.append(_gpu(row, line))
    return drivers, tuple(gpus)


def parse_driver_cuda(header: str) -> tuple[int, ...] | None:
    """Return the CUDA release of the driver from what ``HEADER`` prints; None where it does not say."""
    match = re.search(r"^CUDA Version\s*:\s*(\d+)\.(\d+)", header, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def parse_links(status: str) -> dict[int, int]:
    """Return how many NVLinks of each GPU are up, of what ``LINKS`` prints."""
    active: dict[int, int] = {}
    gpu = None
    for line in status.splitlines():
        if match := re.match(r"GPU (\d+):", line):
            gpu = int(match[1])
            active[gpu] = 0
        elif gpu is not None and re.match(r"\s+Link \d+: [\d.]+ GB/s", line):
            active[gpu] += 1
    return active


def parse_slow_pairs(matrix: str) -> dict[tuple[int, int], str]:
    """Return the pairs of GPUs that NVLink does not join, of what ``TOPOLOGY`` prints."""
    # The heading is underlined by escape sequences.
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in matrix.splitlines()]
    rows = [line.split() for line in lines if re.match(r"GPU\d+\s+(X|NV\d+|SYS|NODE|PHB|PXB|PIX)\b", line)]
    slow = {}
    for first, cells in enumerate(rows):
        for second, way in enumerate(cells[1 : len(rows) + 1]):
            if first < second and _CELL.fullmatch(way) and not way.startswith("NV"):
                slow[first, second] = way
    return slow


def _gpu(row: dict[str, str], line: str) -> Gpu:
    errors = row["ecc.errors.uncorrected.volatile.total"]
    try:
        return Gpu(
            index=int(row["index"]),
            name=row["name"],
            memory_bytes=int(row["memory.total"]) * _MIB,
            used_bytes=int(row["memory.used"]) * _MIB,
            compute_capability=tuple(map(int, row["compute_cap"].split("."))),
            persistent=None if row["persistence_mode"] in _ABSENT else row["persistence_mode"] == "Enabled",
            mig=row["mig.mode.current"] == "Enabled",
            uncorrected_errors=None if errors in _ABSENT else int(errors),
            compute_mode=row["compute_mode"],
        )
    except ValueError as error:
        raise ProbeError(f"nvidia-smi prints {line.strip()!r} for a GPU") from error
