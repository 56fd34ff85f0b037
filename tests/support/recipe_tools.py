"""A recipe small enough for a test: the miniature experiments with a model of 2 narrow layers and a few steps."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.data.mds import MdsWriter
from tests.support.tiny import VOCAB_SIZE

SCRIPT = CONFIG_DIR.parent / "scripts" / "recipe.py"
STAGES = ("base", "stage1", "stage2", "sft")
STEPS = 12
_LENGTHS = {"base": 64, "stage1": 128, "stage2": 256, "sft": 128}
_COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}
_MODEL = (
    "hidden_size=64",
    "ffn_hidden_size=128",
    "num_attention_heads=4",
    "kv_channels=16",
    f"vocab_size={VOCAB_SIZE}",
)
TINY = (
    *(f"model.{setting}" for setting in _MODEL),
    *(f"train.train_iters={STEPS}", "train.val_check_interval=0", "optim.lr_warmup_iters=2"),
    *("data.validation=[]", "data.num_workers=0", "checkpoint.save_interval_steps=4"),
)
"""What makes a stage of the miniature one for a test."""


def write_recipe_data(root: Path) -> Path:
    """Write a row set for every stage, with masks for SFT, and an empty directory for a tokenizer."""
    rng = np.random.default_rng(0)
    for stage, seq_length in _LENGTHS.items():
        masks = {"mask": "ndarray:uint8"} if stage == "sft" else {}
        with MdsWriter(root / stage, {**_COLUMNS, **masks}) as writer:
            for _ in range(2 * STEPS):
                half = seq_length // 2
                ids = (rng.integers(32) + np.cumsum(rng.integers(0, 3, seq_length))) % 32
                row = {
                    "input_ids": ids.astype(np.uint32),
                    "indices": np.array([[0, half], [half, seq_length]], np.uint32),
                    "domain": stage,
                    "length": seq_length,
                }
                writer.write({**row, **({"mask": (np.arange(seq_length) % 3 > 0).astype(np.uint8)} if masks else {})})
    (root / "tokenizer").mkdir()
    return root


def recipe_command(directory: Path, data: Path, *more: str, ranks: int = 1) -> list[str]:
    """Return the command that trains the tiny recipe with its runs in ``directory/runs`` and exports it."""
    everywhere = [f"runs_dir={directory}/runs", f"data.root={data}", *TINY]
    stages = [
        f"{{exp: mini/{stage}, overrides: ['seq_length={_LENGTHS[stage]}', "
        f"'data.mixture=[{{path: {stage}, proportion: 1.0}}]', 'advertised_context_length=null']}}"
        for stage in STAGES
    ]
    return [
        sys.executable,
        str(SCRIPT),
        "+exp=mini/recipe",
        f"stages=[{', '.join(stages)}]",
        f"overrides=[{', '.join(repr(override) for override in everywhere)}]",
        f"export_overrides=['output={directory}/export']",
        f"ranks={ranks}",
        *more,
    ]
