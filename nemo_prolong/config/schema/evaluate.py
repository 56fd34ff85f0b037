"""The configuration of ``scripts/evaluate.py``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from nemo_prolong.config.schema.base import Section, Size


class EvaluateConfig(Section):
    """The configuration of ``scripts/evaluate.py``."""

    models: list[str] = Field(min_length=1)
    """Run directories (through Megatron) or ``hf:DIR`` directories (through ``transformers``)."""
    output: str | None = None
    """Directory for the results; by default ``<run>/eval``, and ``<DIR>_eval`` beside the directory of ``hf:DIR``."""
    rows: str
    """Directory of packed rows to score, one document per row as a rule."""
    position_buckets: list[Size] = Field(min_length=1)
    """Upper ends of the position buckets for perplexity, ascending."""
    max_documents: PositiveInt
    """Documents scored for perplexity."""
    recall_lengths: list[Size] = Field(min_length=1)
    """Prompt lengths of the key-value recall task, in tokens."""
    recall_samples: PositiveInt
    """Prompts per length."""
    seed: Annotated[int, Field(ge=0)] = 42
