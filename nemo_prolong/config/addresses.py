"""How models and data are named in a configuration: a directory, ``hf:DIR``, or an address such as ``s3://``."""

from __future__ import annotations

from pathlib import Path

from nemo_prolong.config.schema import DataConfig

HF_PREFIX = "hf:"
"""Marks a model that is a Hugging Face directory rather than a run directory."""


def is_address(root: str) -> bool:
    """Return whether a data root is an address such as ``s3://``, not a directory of this machine."""
    return "://" in root


def tokenizer_directory(data: DataConfig) -> Path:
    """Return where the tokenizer lies; beside remote rows it is a local directory of its own."""
    return Path(data.tokenizer) if is_address(data.root) else Path(data.root) / data.tokenizer
