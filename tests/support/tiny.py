"""A stage small enough for a test: 2 layers, a vocabulary of 512, real MDS rows of random documents.

Imported by tests and by the programs they start, so it imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.tokenizer import BOS, EOS

SEQ_LENGTH = 64
VOCAB_SIZE = 512
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}

# One of them without a name.
DOMAINS = ("walk", "stroll", "")

# Odd lengths, one token, a whole row: every kind of document a packed row can hold.
DOCUMENT_LENGTHS = ([1, 30, 33], [64], [7, 20, 20, 17], [63, 1], [32, 31], [5, 5, 5, 5, 5])


def write_data(root: Path, rows: int = 48, seq_length: int = SEQ_LENGTH) -> Path:
    """Write one row set of random documents and a tokenizer below ``root``; the last kind of row is not full."""
    rng = np.random.default_rng(0)
    scale = seq_length // SEQ_LENGTH
    with MdsWriter(root / "rows", COLUMNS) as writer:
        for row in range(rows):
            bounds = np.cumsum([0, *DOCUMENT_LENGTHS[row % len(DOCUMENT_LENGTHS)]]) * scale
            # A walk with small steps, so that there is something to learn.
            ids = (rng.integers(32) + np.cumsum(rng.integers(0, 3, bounds[-1]))) % 32
            writer.write(
                {
                    "input_ids": ids.astype(np.uint32),
                    "indices": np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.uint32),
                    "domain": DOMAINS[row % len(DOMAINS)],
                    "length": int(bounds[-1]),
                }
            )
    write_plain_tokenizer(root / "tokenizer")
    return root


def write_plain_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE, **config: Any) -> Path:
    """Write a tokenizer of so many tokens; ``config`` is for ``tokenizer_config.json``, whose keys None removes."""
    tokenizer = Tokenizer(models.BPE({f"t{number}": number for number in range(vocab_size - 2)}, []))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **config}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {key: value for key, value in named.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


def tiny_config(data_root: Path, runs_dir: Path, **changes: Any) -> RunConfig:
    """Return a from-scratch stage on ``data_root``; ``changes`` replace top-level keys, dicts are merged."""
    values: dict[str, Any] = {
        "stage": "base",
        "name": "tiny",
        "runs_dir": str(runs_dir),
        "parent": None,
        "transition": "scratch",
        "seq_length": SEQ_LENGTH,
        "model": {
            "name": "tiny-llama",
            "nemo_config": "LlamaConfig",
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "vocab_size": VOCAB_SIZE,
            "rotary_base": 10000.0,
        },
        "data": {
            "root": str(data_root),
            "tokenizer": "tokenizer",
            "mixture": [{"path": "rows", "proportion": 1.0}],
            "num_workers": 0,
        },
        "train": {"train_iters": 4, "global_batch_size": 4},
        "parallelism": {},
        "precision": {"compute": "fp32"},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 1},
        "checkpoint": {"save_interval_steps": 100},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return RunConfig(**values)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
