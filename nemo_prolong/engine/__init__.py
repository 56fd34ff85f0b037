"""The only room that imports nemo, megatron, lightning, transformer_engine and modelopt.

Other rooms call the functions here and import nothing below. Each function changes the foreign code that this machine
needs changed (``patches.prepare``), then imports its module: importing this package imports no library.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_prolong.config.ending import raise_if_interrupted

if TYPE_CHECKING:
    import torch

    from nemo_prolong.config.rules.attention import Platform
    from nemo_prolong.config.schema import RunConfig
    from nemo_prolong.engine.inference import MegatronScorer
    from nemo_prolong.engine.training.stage_training import StageTotals
    from nemo_prolong.errors import ConfigError
    from nemo_prolong.records.run_directory import RunDirectory

__all__ = [
    "MegatronScorer",
    "StageTotals",
    "current_platform",
    "dequantize",
    "environment_findings",
    "open_megatron_scorer",
    "quantize_directory",
    "train_stage",
    "write_engine_checkpoint",
]


def environment_findings(cfg: RunConfig) -> list[ConfigError]:
    """Return what the process asks of Transformer Engine against the configuration; see ``te.environment``."""
    from nemo_prolong.engine.te import environment

    return environment.environment_findings(cfg)


def current_platform() -> Platform:
    """Return what this process runs on; see ``platform``. Needs torch alone, and is quick."""
    from nemo_prolong.engine import platform

    return platform.current_platform()


def train_stage(
    cfg: RunConfig, run: RunDirectory, resume: Path | None, parent_checkpoint: Path | None, complete: bool = False
) -> StageTotals | None:
    """Train a stage and return its totals; see ``training.stage_training.train_stage``."""
    _prepare()
    from nemo_prolong.engine.training import stage_training

    raise_if_interrupted()
    return stage_training.train_stage(cfg, run, resume, parent_checkpoint, complete)


def open_megatron_scorer(run_dir: Path | str, weights_dtype: torch.dtype | None = None) -> MegatronScorer:
    """Return the scorer of a run's newest checkpoint; see ``inference.MegatronScorer``."""
    _prepare()
    from nemo_prolong.engine.inference import MegatronScorer

    return MegatronScorer(run_dir, weights_dtype=weights_dtype)


def quantize_directory(directory: Path, output: Path, documents: Iterable[torch.Tensor]) -> None:
    """Write a bf16 Hugging Face directory in FP8; see ``fp8_export.quantize_directory``."""
    _prepare()
    from nemo_prolong.engine import fp8_export

    fp8_export.quantize_directory(directory, output, documents)


def write_engine_checkpoint(
    directory: Path,
    output: Path,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    documents: Iterable[torch.Tensor] | None,
) -> None:
    """Write a checkpoint for ``trtllm-build``; see ``fp8_export.write_engine_checkpoint``."""
    _prepare()
    from nemo_prolong.engine import fp8_export

    fp8_export.write_engine_checkpoint(
        directory, output, tensor_parallel_size, pipeline_parallel_size, documents=documents
    )


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return an FP8 weight in fp32; see ``fp8_export.dequantize``."""
    _prepare()
    from nemo_prolong.engine import fp8_export

    return fp8_export.dequantize(weight, scale)


def _prepare() -> None:
    """Change foreign code, once; imports torch, which importing this package does not."""
    from nemo_prolong.engine.patches import prepare

    prepare()
