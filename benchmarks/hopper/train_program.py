"""Train the stages of a file that ``runs.train`` wrote: ``python -m benchmarks.hopper.train_program JOBS.json``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.hopper.runs import jobs_of, run_jobs


def hide_gpu_libraries() -> None:
    """Keep Megatron from libraries that compute on a GPU alone: it calls them wherever it can import them."""
    for name in ("transformer_engine", "apex", "amp_C"):
        sys.modules[name] = None  # type: ignore[assignment]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        hide_gpu_libraries()
    run_jobs(jobs_of(Path(sys.argv[1]).read_text()))
