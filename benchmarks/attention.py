"""Document attention against the same attention by other means: time of forward and backward on this machine.

Two peers, both torch's own scaled_dot_product_attention: with a dense boolean document mask, the usual way to keep
documents apart without a kernel for it; and called for each document alone, which is the work that cannot be avoided.
Output and gradients are checked for equality before anything is timed. Runs are interleaved after a warm-up; figures
are medians.

    python benchmarks/attention.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nemo_prolong.ops.attention import document_attention

HEADS, GROUPS, HEAD_DIM = 6, 2, 32
REPEATS = 5

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def document_lengths(row_tokens: int, mean_tokens: int, seed: int) -> list[int]:
    """Return random document lengths that fill a row, exponentially distributed as short web text is."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < row_tokens:
        lengths.append(min(1 + int(rng.exponential(mean_tokens)), row_tokens - sum(lengths)))
    return lengths


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return torch's attention of q [T, H, C], k and v [T, K, C]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **arguments)[0].transpose(0, 1)


def masked_attention(lengths: list[int]) -> Attention:
    """Return attention of the whole row under its causal document mask, bool [T, T]."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None]).tril_()
    return lambda q, k, v: sdpa(q, k, v, attn_mask=mask)


def attention_one_by_one(lengths: list[int]) -> Attention:
    """Return causal attention of each document alone."""
    return lambda *row: torch.cat(
        [sdpa(*document, is_causal=True) for document in zip(*(x.split(lengths) for x in row), strict=True)]
    )


def check_equality(sides: dict[str, Attention], inputs: list[torch.Tensor]) -> None:
    """Stop unless both sides have the same output and gradients."""
    results = []
    for attention in sides.values():
        output = attention(*inputs)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for ours, peer in zip(*results, strict=True):
        torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4)


def median_seconds(sides: dict[str, Attention], inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Return the medians of forward and backward of ours and of the peer."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, attention in sides.items():
            started = time.perf_counter()
            attention(*inputs).sum().backward()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["ours"]), statistics.median(seconds["peer"])


def measure(name: str, lengths: list[int], peer: Callable[[list[int]], Attention], bound: float) -> dict[str, Any]:
    """Time both sides on one row and return the benchmark's record.

    The ratio is how many times faster than the dense mask ours is, at least ``bound``; or how many times slower than
    the documents alone, at most ``bound``.
    """
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(sum(lengths), h, HEAD_DIM, generator=generator).requires_grad_() for h in (HEADS, GROUPS, GROUPS)
    ]
    sides = {"ours": lambda q, k, v: document_attention(q, k, v, cu_seqlens), "peer": peer(lengths)}
    check_equality(sides, inputs)
    ours, other = median_seconds(sides, inputs)
    alone = peer is attention_one_by_one
    ratio = ours / other if alone else other / ours
    return {
        "bar": f"{name}, {'time of documents alone' if alone else 'faster than a dense mask'}",
        "ours": round(ours * 1e3, 2),
        "peer": round(other * 1e3, 2),
        "unit": "ms",
        "ratio": round(ratio, 2),
        "bound": bound,
        "met": ratio <= bound if alone else ratio >= bound,
    }


def table_line(row: dict[str, Any]) -> str:
    """Return one record as a line of the table."""
    return (
        f"{row['bar']:62} {row['ours']:>7} ms {row['peer']:>8} ms {row['ratio']:>6}x {row['bound']:>6} "
        f"{'met' if row['met'] else 'MISSED'}"
    )


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    equal, short, long = [1024] * 8, document_lengths(8192, 300, seed=0), document_lengths(8192, 2048, seed=0)
    print(f"{'forward and backward':62} {'ours':>10} {'peer':>11} {'ratio':>7} {'bound':>6}")
    rows = []
    for name, lengths, faster in (("equal", equal, 8.0), ("random", short, 1.0), ("random", long, 1.0)):
        for peer, bound in ((masked_attention, faster), (attention_one_by_one, 1.15)):
            rows.append(measure(f"{len(lengths)} {name} documents in 8K tokens", lengths, peer, bound))
            print(table_line(rows[-1]), flush=True)
    if arguments.json:
        versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
