"""The configuration of ``scripts/evaluate.py``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from nemo_prolong.config.schema.base import Count, Name, Names, RowTokens, Section, Seed, distinct


class EvaluateConfig(Section):
    """The configuration of ``scripts/evaluate.py``."""

    models: Names = Field(min_length=1)
    """Run directories (through Megatron) or ``hf:DIR`` directories (through ``transformers``)."""
    output: Name | None = None
    """Directory for the results; by default ``<run>/eval``, and ``<DIR>_eval`` beside the directory of ``hf:DIR``."""
    rows: Name
    """Directory of packed rows to score, one document per row as a rule."""
    position_buckets: list[RowTokens] = Field(min_length=1)
    """Upper ends of the position buckets for perplexity, ascending."""
    max_documents: Count
    """Documents scored for perplexity."""
    recall_lengths: Annotated[list[RowTokens], AfterValidator(distinct)] = Field(min_length=1)
    """Prompt lengths of the key-value recall task, in tokens."""
    recall_samples: Count
    """Prompts per length."""
    seed: Seed = 42
    """Seed of the prompts."""
    when_complete: Literal["repeat", "succeed"] = "repeat"
    """What results of the same model and settings are: measured again, or done. Jobs of a chain say succeed."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a result records of it, in plain JSON types."""
        return self.model_dump(mode="json", exclude={"when_complete"})
