"""The data step of Transformer Engine: rows of few shapes, and under FP8 in round numbers on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemo_prolong.config.schema import PrecisionConfig
from nemo_prolong.data.batch import RankBatch
from nemo_prolong.engine.te.fp8 import is_fp8
from nemo_prolong.engine.training.packed_step import packed_data_step

_TILE_TOKENS = 16
"""FP8 matrix products want multiples of this in every dim; in the gradient of a weight, tokens are one."""

_BLOCK_TOKENS = 128
"""Blockwise scaling keeps one factor per 128 tokens and refuses to gather a shard that is no multiple of it."""


def te_data_step(dataloader_iter: Iterator[Any]) -> RankBatch:
    """Return the next micro-batch as ``packed_data_step``, in one of few shapes."""
    return packed_data_step(dataloader_iter, few_shapes=True)


def fp8_data_step(dataloader_iter: Iterator[Any]) -> RankBatch:
    """Return the next micro-batch as ``packed_data_step``, in multiples of 16 tokens per rank and chunk."""
    return packed_data_step(dataloader_iter, tile_tokens=_TILE_TOKENS, few_shapes=True)


def fp8_block_data_step(dataloader_iter: Iterator[Any]) -> RankBatch:
    """Return the next micro-batch as ``packed_data_step``, in multiples of 128 tokens per rank and chunk."""
    return packed_data_step(dataloader_iter, tile_tokens=_BLOCK_TOKENS, few_shapes=True)


def data_step_of(precision: PrecisionConfig) -> Any:
    """Return the data step of a precision; a module-level function, because NeMo keeps it in its config."""
    if not is_fp8(precision):
        return te_data_step
    return fp8_block_data_step if precision.fp8_recipe == "blockwise" else fp8_data_step
