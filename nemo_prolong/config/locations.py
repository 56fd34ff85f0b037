"""Where results lie, for the rooms that write them and the rooms that read them. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_prolong.config.schema import DataConfig

HF_PREFIX = "hf:"
"""Marks a model that is a Hugging Face directory rather than a run directory."""


def evaluation_directory(model: str) -> Path:
    """Return the directory of a model's evaluation results when none is configured.

    A run directory holds its own results. Those of ``hf:DIR`` lie beside DIR, because DIR is what gets published.

    >>> evaluation_directory("runs/demo/sft").as_posix(), evaluation_directory("hf:runs/demo/export/hf").as_posix()
    ('runs/demo/sft/eval', 'runs/demo/export/hf_eval')
    """
    if model.startswith(HF_PREFIX):
        directory = Path(model.removeprefix(HF_PREFIX))
        return directory.with_name(f"{directory.name}_eval")
    return Path(model) / "eval"


_STEP_DIRECTORY = re.compile(r"step_(\d{8})")


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` optimizer steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending; a directory with a final name is complete."""
    matches = (_STEP_DIRECTORY.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("*"))
    return sorted(int(match[1]) for match in matches if match)


def is_address(root: str) -> bool:
    """Return whether a data root is an address such as ``s3://``, not a directory of this machine."""
    return "://" in root


def tokenizer_directory(data: DataConfig) -> Path:
    """Return where the tokenizer lies; beside remote rows it is a local directory of its own."""
    return Path(data.tokenizer) if is_address(data.root) else Path(data.root) / data.tokenizer


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None; the time of a file means nothing."""
    steps = complete_steps(run_dir)
    return checkpoint_directory(run_dir, steps[-1]) if steps else None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps of a checkpoint directory.

    >>> step_of(Path("runs/stage1/checkpoints/step_00005000"))
    5000
    """
    match = _STEP_DIRECTORY.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])
