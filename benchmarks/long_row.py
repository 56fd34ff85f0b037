"""Peak memory of one packed row of 64K and of 512K tokens, forward and backward, through the engine's own model.

The model is NeMo's and Megatron's with the torch backend: 2 layers, a vocabulary of 128,256, every layer computed again
in the backward pass as the recipe does. The row holds real documents: each is a Python package of this installation,
all files of it in one document as ProLong's code domain has them, two bytes of text a token, cut at 32K tokens. Each
length runs in a process of its own; the figure is the peak of resident memory above that of the model without a row.

    python benchmarks/long_row.py [--json FILE]

Takes about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_prolong.config.schema import ModelConfig, ParallelismConfig, PrecisionConfig, RecomputeConfig

if TYPE_CHECKING:
    from nemo_prolong.data.batch import PackedBatch

LENGTHS = (65_536, 524_288)
LONGEST_DOCUMENT = 32_768
BOUND_GIB = 10.0
MODEL = ModelConfig(
    name="two layers",
    nemo_config="LlamaConfig",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=128_256,
    rotary_base=1.28e8,
)
RECOMPUTE = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def documents(tokens: int) -> list[np.ndarray]:
    """Return documents of this Python installation, ``tokens`` tokens in all; the last one is cut to fit."""
    from nemo_prolong.data.miniature.installation import Installation

    found, missing = [], tokens
    for repository in Installation.current().repositories():
        text = b"".join(file.path.read_bytes() for file in repository.code)
        ids = np.frombuffer(text[: len(text) // 2 * 2], dtype="<u2").astype(np.int64) % MODEL.vocab_size
        ids = ids[: min(LONGEST_DOCUMENT, missing)]
        if len(ids):
            found.append(ids)
            missing -= len(ids)
        if not missing:
            return found
    raise SystemExit(f"this installation holds {tokens - missing} tokens of Python, {tokens} are needed.")


def micro_batch(row: list[np.ndarray]) -> PackedBatch:
    """Return the micro-batch of one row, as the loader makes it."""
    import torch

    from nemo_prolong.data.dataset import RowFormat, build_row, collate_rows

    ids = np.concatenate(row)
    ends = np.cumsum([len(document) for document in row])
    stored = {"input_ids": ids.astype(np.uint32), "indices": np.stack([ends - [len(d) for d in row], ends], axis=1)}
    sample = build_row(stored, RowFormat(seq_length=len(ids), vocab_size=MODEL.vocab_size), "the benchmark")
    assert torch.equal(sample.cu_seqlens[1:].long(), torch.from_numpy(ends))
    return collate_rows([sample])


def print_peak(tokens: int) -> None:
    """Run one row forward and backward and print its figures as JSON; to be called in a fresh process."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import torch

    from nemo_prolong.engine.inference import start_single_process
    from nemo_prolong.engine.model.nemo_model import build_nemo_config
    from nemo_prolong.engine.training.packed_step import ExactLossReduction, packed_data_step, packed_forward_step

    torch.manual_seed(0)
    start_single_process()
    precision = PrecisionConfig(compute="fp32", recompute=RECOMPUTE)
    model = build_nemo_config(MODEL, tokens, ParallelismConfig(), precision).configure_model(tokenizer=None).train()
    row = documents(tokens)
    batch = micro_batch(row)
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    batch = packed_data_step(iter([batch]))
    loss, targets, _ = ExactLossReduction().forward(batch, packed_forward_step(model, batch))
    (loss / targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    figures = {
        "documents": len(row),
        "longest_document_tokens": max(map(len, row)),
        "target_tokens": int(targets),
        "loss": float(loss / targets),
        "peak_bytes": resident_bytes("VmHWM") - before,
        "process_peak_bytes": resident_bytes("VmHWM"),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(figures))


def resident_bytes(field: str) -> int:
    """Return a figure of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(tokens: int) -> dict[str, Any]:
    """Return the figures of one length, measured in a fresh process."""
    # So that the C library returns every large tensor at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, __file__, "--peak", str(tokens)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def measure() -> list[dict[str, Any]]:
    """Print the figures of every length and return the records."""
    gib = {}
    for tokens in LENGTHS:
        figures = peak(tokens)
        gib[tokens] = figures["peak_bytes"] / 2**30
        print(f"{tokens:,} tokens: {json.dumps(figures)}", flush=True)
        process_gib = figures["process_peak_bytes"] / 2**30
    short, long = LENGTHS
    growth, proportional = gib[long] / gib[short], long / short
    return [
        {
            "bar": "whole process at 512K tokens, against the bound",
            "ours": round(process_gib, 3),
            "peer": BOUND_GIB,
            "unit": "GiB",
            "ratio": round(BOUND_GIB / process_gib, 3),
            "bound": 1.0,
            "met": process_gib <= BOUND_GIB,
        },
        {
            "bar": "growth of the peak from 64K to 512K, against growth of the row",
            "ours": round(growth, 3),
            "peer": proportional,
            "unit": "times",
            "ratio": round(proportional / growth, 3),
            "bound": 0.95,
            "met": proportional / growth >= 0.95,
        },
    ]


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak)
        return
    import torch

    rows = measure()
    for row in rows:
        print(f"{row['bar']}: {row['ours']} {row['unit']} (bound met: {row['met']})")
    if arguments.json:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        versions = {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}
        arguments.json.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
