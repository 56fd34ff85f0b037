"""Where results lie, for the rooms that write them and the rooms that read them. Needs no torch."""

from __future__ import annotations

import logging
from pathlib import Path

from nemo_prolong.config.checkpoint_files import choose_checkpoint
from nemo_prolong.config.checkpoint_manifest import checkpoint_directory, step_of
from nemo_prolong.config.schema import DataConfig

__all__ = [
    "HF_PREFIX",
    "checkpoint_directory",
    "evaluation_directory",
    "is_address",
    "newest_checkpoint",
    "step_of",
    "tokenizer_directory",
]

log = logging.getLogger(__name__)

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


def is_address(root: str) -> bool:
    """Return whether a data root is an address such as ``s3://``, not a directory of this machine."""
    return "://" in root


def tokenizer_directory(data: DataConfig) -> Path:
    """Return where the tokenizer lies; beside remote rows it is a local directory of its own."""
    return Path(data.tokenizer) if is_address(data.root) else Path(data.root) / data.tokenizer


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the verified checkpoint of the highest step, or None where the run has no checkpoint.

    Newer ones that are damaged are named in warnings.

    Raises:
        CheckpointError: If there are checkpoints and none of them is good.
    """
    choice = choose_checkpoint(run_dir)
    for refusal in choice.refused:
        log.warning("refused %s", refusal)
    if choice.checkpoint is not None:
        log.info(choice.summary)
    return choice.checkpoint
