"""The layouts of these tests, their rows and their configuration; imports neither torch nor NeMo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.mds import MdsWriter

SEQ_LENGTH = 64
VOCAB_SIZE = 509
"""Three short of the padded embedding: padded columns must take no part in the loss."""
STEPS = 20
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}

TRAINING_DOCUMENTS = (
    [1, 30, 33],
    [64],
    [7, 20, 20, 17],
    [63, 1],
    [32, 31],
    [5, 5, 5, 5, 5],
    [1],  # no target at all: shards of padding
    [2],  # one target: all context-parallel ranks but one have nothing
    [1, 1, 1, 61],
)
"""Odd lengths, one token, a whole row and longer than any shard; some rows are not full."""

VALIDATION_DOCUMENTS = {"original": [7, 20, 1, 19, 17], "perturbed": [7, 20, 1, 19, 17], "one": [1], "whole": [64]}
PERTURBED_DOCUMENT = 1


DEGREES = (
    {"tp": 2},
    {"pp": 2},
    {"cp": 2},
    {"dp": 2},
    {"tp": 2, "cp": 2},
    {"cp": 2, "dp": 2},
    {"tp": 2, "dp": 2},
    {"pp": 2, "cp": 2},
    {"tp": 2, "pp": 2},
    {"cp": 4},
)


def _layout(degrees: dict[str, int], exchange: str | None, sequence_parallel: bool) -> dict[str, Any]:
    """Return the number of ranks and the parallelism of some degrees; those not named are 1."""
    return {
        "ranks": math.prod(degrees.values()),
        "parallelism": {
            "tensor_model_parallel_size": degrees.get("tp", 1),
            "pipeline_model_parallel_size": degrees.get("pp", 1),
            "context_parallel_size": degrees.get("cp", 1),
            "sequence_parallel": sequence_parallel,
            "cp_comm_type": exchange or "p2p",
        },
    }


def _name(degrees: dict[str, int], exchange: str | None, sequence_parallel: bool) -> str:
    sizes = [f"{dimension}{size}" for dimension, size in degrees.items()]
    return "_".join([*sizes, *([exchange] if exchange else []), *(["sp"] if sequence_parallel else [])])


def _all_layouts() -> dict[str, dict[str, Any]]:
    layouts = {}
    for degrees in DEGREES:
        for exchange in ("p2p", "all_gather", "a2a") if "cp" in degrees else (None,):
            for sequence_parallel in (False, True) if "tp" in degrees else (False,):
                layout = _layout(degrees, exchange, sequence_parallel)
                layouts[_name(degrees, exchange, sequence_parallel)] = layout
    return layouts


LAYOUTS = _all_layouts()
"""By name: degrees above 1 such as ``tp2_cp2``, the exchange of CP, and sp for sequence parallelism."""

ONE_RANK = "one_rank"

RECOMPUTED: dict[str, dict[str, Any]] = {
    "recompute_uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "recompute_block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "recompute_mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}
"""Policies of recomputation, on one rank."""


def write_rows(root: Path) -> Path:
    """Write training rows, validation rows and an empty tokenizer file below ``root``."""
    rng = np.random.default_rng(7)
    training = [(TRAINING_DOCUMENTS[row % len(TRAINING_DOCUMENTS)], "walk") for row in range(45)]
    with MdsWriter(root / "rows", COLUMNS) as writer:
        for lengths, domain in training:
            writer.write(_row(_tokens(rng, sum(lengths)), lengths, domain))
    with MdsWriter(root / "validation", COLUMNS) as writer:
        ids = _tokens(rng, SEQ_LENGTH)
        for name, lengths in VALIDATION_DOCUMENTS.items():
            row = ids[: sum(lengths)].copy()
            if name == "perturbed":
                start, end = np.cumsum([0, *lengths])[PERTURBED_DOCUMENT : PERTURBED_DOCUMENT + 2]
                row[start:end] = (row[start:end] + 100) % VOCAB_SIZE
            writer.write(_row(row, lengths, name))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text(json.dumps({}))
    return root


def _tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(0, VOCAB_SIZE, length)


def _row(ids: np.ndarray, lengths: list[int], domain: str) -> dict[str, Any]:
    bounds = np.cumsum([0, *lengths])
    spans = np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.uint32)
    return {"input_ids": ids.astype(np.uint32), "indices": spans, "domain": domain, "length": int(bounds[-1])}


def stage_config(data_root: Path, runs_dir: Path, name: str, **changes: Any) -> RunConfig:
    """Return a stage of ``STEPS`` steps; ``changes`` replace top-level keys, dicts are merged."""
    values: dict[str, Any] = {
        "stage": "stage1",
        "name": name,
        "runs_dir": str(runs_dir),
        "parent": str(runs_dir / "start"),
        "transition": "weights",
        "seq_length": SEQ_LENGTH,
        "model": {
            "name": "tiny-llama",
            "nemo_config": "LlamaConfig",
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "kv_channels": 8,
            "vocab_size": VOCAB_SIZE,
            "make_vocab_size_divisible_by": 64,
            "rotary_base": 10000.0,
        },
        "data": {
            "root": str(data_root),
            "tokenizer": "tokenizer",
            "mixture": [{"path": "rows", "proportion": 1.0}],
            "validation": ["validation"],
            "num_workers": 0,
        },
        # The learning rate of the first step is zero: the first validation sees the weights of the parent.
        "train": {"train_iters": STEPS, "global_batch_size": 4, "val_check_interval": 1, "limit_val_batches": 1},
        "parallelism": {},
        "precision": {"compute": "fp32"},
        # Gradients are not clipped, so that the first moment after one step is 0.1 of the gradient.
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 1, "clip_grad": 0.0},
        "checkpoint": {"save_interval_steps": 1, "keep_last": 99},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return RunConfig(**values)
