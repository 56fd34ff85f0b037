"""Compose configurations without a command line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import RunConfig, Section


@functools.cache
def _compose(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="session")
def compose_config() -> Callable[..., DictConfig]:
    """A function from an entry point and overrides to Hydra's configuration. Treat the result as read-only."""
    return _compose


@pytest.fixture(scope="session")
def load_config() -> Callable[..., Section]:
    """A function from an entry point, its schema and overrides to the typed configuration, not checked."""
    return lambda name, schema, *overrides: load(_compose(name, *overrides), schema)


@pytest.fixture(scope="session")
def load_run() -> Callable[..., RunConfig]:
    """A function from overrides of ``scripts/train.py`` to the typed configuration, not checked."""
    return lambda *overrides: load(_compose("train", *overrides), RunConfig)
