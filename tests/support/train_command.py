"""The command that trains a stage small enough for a test: ``scripts/train.py`` with the model of ``recipe_tools``."""

from __future__ import annotations

from pathlib import Path

from nemo_prolong.config.compose import CONFIG_DIR
from tests.support.recipe_tools import TINY

SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"


def train_arguments(directory: Path, data: Path, name: str, *more: str) -> list[str]:
    """Return the words after ``python``: the base of the miniature, with its run in ``directory/NAME``.

    Args:
        directory: For runs.
        data: Of ``write_recipe_data`` with a tokenizer.
        name: Of the run.
        more: Further overrides.
    """
    overrides = [*TINY, f"runs_dir={directory}", f"data.root={data}", f"name={name}", *more]
    return [
        str(SCRIPT),
        "+exp=mini/base",
        "seq_length=64",
        "data.mixture=[{path: base, proportion: 1.0}]",
        "advertised_context_length=null",
        *overrides,
    ]
