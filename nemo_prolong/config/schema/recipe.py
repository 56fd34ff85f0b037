"""The typed configuration of ``scripts/recipe.py``: a chain of stages and an export, as one would type them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_prolong.config.schema import Section
from nemo_prolong.config.schema.base import Name


class RecipeStage(Section):
    """One stage of the chain."""

    exp: Name
    """Experiment of ``scripts/train.py``, such as mini/stage1."""
    overrides: list[Name] = Field(default=[])
    """What else would be typed after it; wins over the overrides of the recipe."""


class RecipeConfig(Section):
    """The whole recipe as one command: the configuration of ``scripts/recipe.py``."""

    stages: list[RecipeStage] = Field(min_length=1)
    """Stages in their order; the parent of each is the one before it."""
    overrides: list[Name] = Field(default=[])
    """What would be typed after every stage, such as runs_dir=DIR."""
    parent: Name | None = None
    """Parent of the first stage, as one would type it; null leaves it to the experiment."""
    evaluate_overrides: list[Name] | None = None
    """What would be typed after scripts/evaluate.py, such as rows=DIR; models is the last stage. null evaluates
    nothing."""
    export_overrides: list[Name] | None = None
    """What would be typed after scripts/export.py, such as output=DIR; run is the last stage. null exports nothing."""
    ranks: Annotated[int, Field(gt=0, le=1024)] = 1
    """Processes of this machine that train a stage together, as torchrun --nproc-per-node would start."""
    dry_run: bool = False
    """Print what would be done, and do nothing."""
