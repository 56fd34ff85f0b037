"""Where results lie, for the rooms that write them and the rooms that read them. Needs no torch."""

from __future__ import annotations

from pathlib import Path

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
