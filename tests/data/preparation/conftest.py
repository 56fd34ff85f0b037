"""One prepared directory that many tests look at, and how to make others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.rules import check
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.preparation.run import prepare
from tests.support.mixed import ROW_SETS, write_mixed


@pytest.fixture(scope="session")
def mixed_sources(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Sources of a folder with every local format."""
    return write_mixed(tmp_path_factory.mktemp("mixed") / "corpus", 300)


@pytest.fixture(scope="session")
def mixed_config(mixed_sources: list[dict[str, Any]], tokenizer_directory: Path) -> Callable[..., PrepareConfig]:
    """A function from an output directory and changes to a checked configuration over the mixed folder."""

    def make(output: Path, **changes: Any) -> PrepareConfig:
        settings = {
            "output": str(output),
            "sources": mixed_sources,
            "tokenizer": {"path": str(tokenizer_directory)},
            "row_sets": ROW_SETS,
            "validation_fraction": 0.3,
            "shuffle": True,
            "shard_bytes": 20_000,
            "workers": 1,
        }
        cfg = PrepareConfig(**{**settings, **changes})
        check(cfg)
        return cfg

    return make


@pytest.fixture(scope="session")
def prepared(mixed_config: Callable[..., PrepareConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixed folder, prepared with one worker. Read-only."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare(mixed_config(output))
    return output
