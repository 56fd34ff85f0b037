"""The loss head against two other ways to the same gradients: time and peak memory of forward and backward.

One peer makes all logits at once and gives them to torch's cross_entropy. The other goes block by block under
torch.utils.checkpoint, which makes the logits of each block twice; its blocks are as large as our chunks. Losses and
gradients are checked for equality before anything is timed. Timed runs are interleaved and figures are medians. Memory
is measured in a process of its own for each side: the peak of resident memory above that of weights and hidden states.

    python benchmarks/loss_head.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nemo_prolong.ops.linear_cross_entropy import linear_cross_entropy

VOCAB_SIZE, REPEATS = 128_256, 5
TIMED_TOKENS, TIMED_CHUNK, TIMED_HIDDEN_SIZE = 2048, 512, 256
MEASURED_CHUNK, MEASURED_HIDDEN_SIZE = 2048, 16

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the masked loss sum, ours."""
    return linear_cross_entropy(hidden, weight, labels, mask, chunk_tokens=chunk).loss_sum


def all_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the masked loss sum from [T, V] logits, whatever the chunk."""
    return (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * mask).sum()


def checkpointed(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the masked loss sum from blocks of tokens whose logits are made again in the backward pass."""
    blocks = zip(hidden.split(chunk), labels.split(chunk), mask.split(chunk), strict=True)
    losses = [checkpoint(all_logits, rows, weight, *targets, chunk, use_reentrant=False) for rows, *targets in blocks]
    return torch.stack(losses).sum()


SIDES: dict[str, Head] = {"ours": chunked, "all logits": all_logits, "checkpointed blocks": checkpointed}


def head_inputs(tokens: int, hidden_size: int) -> list[torch.Tensor]:
    """Return hidden states, weight, labels and mask; a tenth of the tokens is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(VOCAB_SIZE, hidden_size, generator=generator) / hidden_size**0.5
    labels = torch.randint(0, VOCAB_SIZE, (tokens,), generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.1).float()
    return [hidden.requires_grad_(), weight.requires_grad_(), labels, mask]


def check_equality(inputs: list[torch.Tensor]) -> None:
    """Stop unless all sides have the same loss and gradients, to 1e-5 of their largest entry."""
    results = {}
    for name, head in SIDES.items():
        loss = head(*inputs, TIMED_CHUNK)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, inputs[:2]))
    for name, values in results.items():
        for ours, peer in zip(results["ours"], values, strict=True):
            error = float((ours - peer).abs().max() / peer.abs().max())
            assert error <= 1e-5, f"ours and {name} differ by {error:.2g}"


def median_seconds() -> dict[str, float]:
    """Return the median of forward and backward of each side."""
    inputs = head_inputs(TIMED_TOKENS, TIMED_HIDDEN_SIZE)
    check_equality(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(REPEATS):
        for name, head in SIDES.items():
            started = time.perf_counter()
            torch.autograd.grad(head(*inputs, TIMED_CHUNK), inputs[:2])
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident(field: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def print_peak(name: str, tokens: int) -> None:
    """Print the bytes that one forward and backward of a side adds; to be called in a fresh process."""
    inputs = head_inputs(tokens, MEASURED_HIDDEN_SIZE)
    before = resident("VmRSS")
    torch.autograd.grad(SIDES[name](*inputs, MEASURED_CHUNK), inputs[:2])
    print(resident("VmHWM") - before)


def peak_bytes(name: str, tokens: int) -> int:
    """Return the peak of a side, measured in a fresh process."""
    # So that the C library returns every large tensor at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, __file__, "--peak", name, str(tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def record(bar: str, ours: float, peer: float, unit: str, bound: float) -> dict[str, Any]:
    """Return the benchmark's record; the ratio is how many times more the peer takes, at least ``bound``."""
    ratio = peer / ours
    values = {"ours": round(ours, 3), "peer": round(peer, 3), "unit": unit, "ratio": round(ratio, 3)}
    return {"bar": bar, **values, "bound": bound, "met": ratio >= bound}


def measure() -> list[dict[str, Any]]:
    """Return all records."""
    gib = {(name, 4096): peak_bytes(name, 4096) / 2**30 for name in SIDES}
    gib["ours", 32768] = peak_bytes("ours", 32768) / 2**30
    seconds = median_seconds()
    rows = []
    for name in ("all logits", "checkpointed blocks"):
        rows.append(record(f"time, 2K tokens: {name}", seconds["ours"], seconds[name], "s", 1.0))
        rows.append(record(f"peak memory, 4K tokens: {name}", gib["ours", 4096], gib[name, 4096], "GiB", 1.0))
    # The peer is ours at an eighth of the tokens: memory that does not depend on them has ratio 1.
    rows.append(record("peak memory, 32K tokens: ours, 4K tokens", gib["ours", 32768], gib["ours", 4096], "GiB", 0.98))
    return rows


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "TOKENS"), help="print the bytes one side takes, and stop")
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak[0], int(arguments.peak[1]))
        return
    rows = measure()
    print(f"{f'vocabulary {VOCAB_SIZE:,}: peer':50} {'ours':>8} {'peer':>8} {'':4} {'ratio':>7} {'bound':>6}")
    for row in rows:
        figures = f"{row['ours']:>8} {row['peer']:>8} {row['unit']:4} {row['ratio']:>6}x {row['bound']:>6}"
        print(f"{row['bar']:50} {figures} {'met' if row['met'] else 'MISSED'}")
    if arguments.json:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
