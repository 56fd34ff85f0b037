"""Document attention against the same attention with a mask: time of forward and backward on this machine.

The peer is torch's own scaled_dot_product_attention with a dense boolean document mask, the usual way to keep documents
apart without a kernel for it. Both compute the same result, which is checked before anything is timed. Runs are
interleaved after a warm-up; figures are medians.

    python benchmarks/attention.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nemo_prolong.ops.attention import document_attention

HEADS, GROUPS, HEAD_DIM = 6, 2, 32
REPEATS = 5


def document_lengths(row_tokens: int, mean_tokens: int, seed: int) -> list[int]:
    """Return random document lengths that fill a row, exponentially distributed as short web text is."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < row_tokens:
        lengths.append(min(1 + int(rng.exponential(mean_tokens)), row_tokens - sum(lengths)))
    return lengths


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return attention under a dense mask bool [T, T]; q [T, H, C], k and v [T, K, C]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def dense_mask(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the causal document mask, bool [T, T]."""
    positions = torch.arange(int(cu_seqlens[-1]))
    document = torch.bucketize(positions, cu_seqlens[1:], right=True)
    return (document[:, None] == document[None]) & (positions[:, None] >= positions[None])


def measure(row_tokens: int, mean_tokens: int) -> dict[str, object]:
    """Time both sides on one row and return the benchmark's record."""
    lengths = document_lengths(row_tokens, mean_tokens, seed=0)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(row_tokens, heads, HEAD_DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = dense_mask(cu_seqlens)
    sides = {
        "ours": lambda: document_attention(*inputs, cu_seqlens),
        "peer": lambda: masked_attention(*inputs, mask),
    }
    torch.testing.assert_close(sides["ours"](), sides["peer"](), rtol=1e-4, atol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(REPEATS + 1):
        for name, attention in sides.items():
            started = time.perf_counter()
            attention().sum().backward()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    ours, peer = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    return {
        "bar": f"forward and backward, row of {row_tokens} tokens, {len(lengths)} documents",
        "ours": round(ours * 1e3, 2),
        "peer": round(peer * 1e3, 2),
        "unit": "ms",
        "ratio": round(peer / ours, 2),
        "bound": 1.0,
        "met": peer >= ours,
    }


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    rows = [measure(2048, 300), measure(8192, 300), measure(8192, 2048)]
    print(f"{'':62} {'ours':>10} {'dense mask':>11} {'ratio':>7}")
    for row in rows:
        print(f"{row['bar']:62} {row['ours']:>7} ms {row['peer']:>8} ms {row['ratio']:>6}x")
    if arguments.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
