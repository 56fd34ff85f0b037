"""What is trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_prolong.config.schema.base import Name, Names, Section


class MixtureEntry(Section):
    """One directory of packed rows and its share of the training rows."""

    path: Name
    """MDS directory, relative to ``data.root``."""
    proportion: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the rows drawn from it, which is its share of the tokens because rows have one length."""


class DataConfig(Section):
    """What is trained on."""

    root: Name
    """Directory or ``s3://`` address that holds the packed directories and the tokenizer."""
    tokenizer: Name
    """Tokenizer directory (``transformers`` format), relative to ``data.root`` or absolute."""
    mixture: list[MixtureEntry] = Field(min_length=1)
    """Training directories; proportions sum to 1."""
    validation: Names = Field(default=[])
    """Directories of packed rows for the validation loss, relative to ``data.root``."""
    apply_instruct_masks: bool = False
    """Train only on tokens whose ``mask`` column is 1."""
    num_workers: Annotated[int, Field(ge=0, le=128)] = 1
    """Loader processes per rank. A node runs one set for each of its ranks, and 128 already fill it."""
    cache: Name | None = None
    """Local directory for copies of remote and compressed shards; null takes one in ``$TMPDIR``."""
