"""Small stages trained by the engine itself, for the stages of the check that compare runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hopper.bench import Bench
from benchmarks.hopper.rows import write_rows
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine import train_stage
from nemo_prolong.logs import run_logging
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import METRICS_FILE

SEQ_LENGTH, VOCAB_SIZE = 2048, 2048
TRAIN_ITERS = 6
_ROWS = ([2048], [512, 512, 512, 512], [1, 700, 1347], [2016, 32], [320, 640, 928, 160])
_SMALL = 32


@dataclass(frozen=True)
class Job:
    """One stage to train.

    Attributes:
        config: The stage.
        resume: Checkpoint of this run to continue from.
        parent: Checkpoint to start from.
    """

    config: RunConfig
    resume: Path | None = None
    parent: Path | None = None


def stage_config(bench: Bench, name: str, **changes: Any) -> RunConfig:
    """Return a stage of a few steps; its rows are written the first time.

    Args:
        bench: A GPU trains 4 layers on rows of 2,048 tokens, a CPU 2 thin ones on rows of 64.
        name: Of the run.
        **changes: Replace top-level keys; dicts are merged.
    """
    scale = 1 if bench.full else _SMALL
    root = bench.scratch / "data"
    if not root.exists():
        write_rows(root, [[max(length // scale, 1) for length in _ROWS[row % len(_ROWS)]] for row in range(40)], 32)
    values: dict[str, Any] = {
        "stage": "base",
        "name": name,
        "runs_dir": str(bench.scratch / "runs"),
        "parent": None,
        "transition": "scratch",
        "seq_length": SEQ_LENGTH // scale,
        "model": _model(bench),
        "data": {
            "root": str(root),
            "tokenizer": "tokenizer",
            "mixture": [{"path": "rows", "proportion": 1.0}],
            "num_workers": 0,
        },
        "train": {"train_iters": TRAIN_ITERS, "global_batch_size": 4},
        "parallelism": {},
        "precision": {"compute": "fp32", "backend": "torch"},
        "optim": {"lr": 2e-3, "min_lr": 2e-4, "lr_warmup_iters": 1},
        "checkpoint": {"save_interval_steps": TRAIN_ITERS},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return RunConfig(**values)


def _model(bench: Bench) -> dict[str, Any]:
    return {
        "name": "tiny",
        "nemo_config": "LlamaConfig",
        "num_layers": bench.sized(4, 2),
        "hidden_size": bench.sized(512, 64),
        "ffn_hidden_size": bench.sized(1536, 128),
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": bench.sized(128, 16),
        "vocab_size": bench.sized(VOCAB_SIZE, 512),
        "rotary_base": 1e4,
    }


def saved(config: RunConfig, step: int) -> Path:
    """Return the checkpoint of a run that is trained already."""
    return checkpoint_directory(Path(config.run_dir), step)


def train(bench: Bench, jobs: Sequence[Job], *, on_cpu: bool = False) -> None:
    """Train stages one after the other; the first that fails ends it.

    Args:
        bench: With a GPU they run in a process of their own, so that all memory of the device is free afterwards.
        jobs: The stages.
        on_cpu: Hide the GPU from them.

    Raises:
        RuntimeError: If one failed, with the last line it said.
    """
    if not bench.full:
        run_jobs(jobs)
        return
    path = bench.scratch / "jobs.json"
    path.write_text(json.dumps([_as_json(job) for job in jobs]))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.hopper.train_program", str(path)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hidden},
    )
    sys.stderr.write(result.stderr)
    if result.returncode:
        raise RuntimeError((result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1])


def run_jobs(jobs: Sequence[Job]) -> None:
    """Train stages in this process; what the libraries say goes to ``train.log`` of each run."""
    for job in jobs:
        run_dir = Path(job.config.run_dir)
        run_dir.mkdir(parents=True)
        with run_logging(run_dir / "train.log", console=False):
            train_stage(job.config, RunDirectory(job.config.run_dir), job.resume, job.parent)


def _as_json(job: Job) -> dict[str, Any]:
    paths = {"resume": job.resume, "parent": job.parent}
    return {"config": job.config.model_dump(mode="json")} | {key: path and str(path) for key, path in paths.items()}


def jobs_of(text: str) -> list[Job]:
    """Return the jobs that ``train`` wrote."""
    jobs = []
    for record in json.loads(text):
        resume, parent = (record[key] and Path(record[key]) for key in ("resume", "parent"))
        jobs.append(Job(RunConfig(**record["config"]), resume, parent))
    return jobs


def figures(config: RunConfig, key: str = "loss") -> list[float]:
    """Return a figure of every step of a run."""
    lines = Path(config.run_dir, METRICS_FILE).read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def largest_difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference of two curves of one length."""
    assert len(actual) == len(expected) > 0, (len(actual), len(expected))
    return largest(abs(got - wanted) / abs(wanted) for got, wanted in zip(actual, expected, strict=True))


def largest(values: Iterable[float]) -> float:
    """Return the largest value; one that is not a number is larger than any, where ``max`` may lose it.

    >>> largest([1.0, float("nan"), 2.0]), largest([1.0, 2.0])
    (nan, 2.0)
    """
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
