"""Run directories as the tests want them, without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.files import write_json_atomically
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.run_directory import CONFIG_FILE
from nemo_prolong.records.stage_manifest import ParentRecord
from nemo_prolong.stages.manifest import new_manifest
from nemo_prolong.stages.preflight import dump
from tests.support.fake_checkpoint import write_checkpoint
from tests.support.tiny import tiny_config, write_data


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """A data directory of one row set."""
    return write_data(tmp_path / "data", rows=6)


@pytest.fixture
def make_config(tmp_path: Path, data_root: Path) -> Callable[..., RunConfig]:
    """A function from changes to a tiny stage on the data, below ``runs``."""
    return lambda **changes: tiny_config(data_root, tmp_path / "runs", **changes)


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """A function that writes what a run leaves: configuration, manifest, checkpoints of ``steps``."""

    def make(cfg: RunConfig, status: str, steps: tuple[int, ...], parent_record: ParentRecord | None = None) -> Path:
        run_dir = Path(cfg.run_dir)
        data = DataManifestFile.read(cfg.data.root, read_bytes)
        manifest = new_manifest(cfg, None, parent_record, "python scripts/train.py +exp=tiny", 1, data)
        manifest.model_copy(update={"status": status, "step": max(steps, default=0)}).write(run_dir)
        write_json_atomically(run_dir / CONFIG_FILE, dump(cfg))
        for step in steps:
            write_checkpoint(run_dir, step)
        return run_dir

    return make


@pytest.fixture
def make_child(make_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """A function from a parent and changes to a stage that starts from it."""

    def make(parent: str | Path, **changes: Any) -> RunConfig:
        return make_config(
            **{"stage": "stage1", "name": "child", "parent": str(parent), "transition": "weights"} | changes
        )

    return make
