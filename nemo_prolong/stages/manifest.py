"""``stage.json``: what a run is, where it came from and what it has seen.

Transition, evaluation, export and report read it; nobody has to remember a setting. Its format is in
docs/architecture.md.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nemo_prolong.config.schema import DataConfig, ModelConfig, RunConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.files import write_text_atomically

MANIFEST_FILE = "stage.json"

_PACKAGES = (
    "nemo_prolong",
    "torch",
    "nemo-toolkit",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "transformers",
    "hydra-core",
)


class ParentRecord(BaseModel):
    """The checkpoint a stage started from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    step: int
    transition: str


class DataRecord(BaseModel):
    """The data a stage was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    tokenizer: str
    mixture: list[dict[str, Any]]
    manifest_sha256: str | None


class StageManifest(BaseModel):
    """The content of ``stage.json``; counts are of this stage alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: int = 1
    name: str
    stage: str
    status: str
    parent: ParentRecord | None
    model: ModelConfig
    seq_length: int
    trained_context_length: int
    advertised_context_length: int
    rotary_base: float
    train_iters: int
    step: int
    consumed_train_rows: int
    consumed_train_tokens: int
    consumed_target_tokens: int
    data: DataRecord
    versions: dict[str, str]
    git_commit: str | None
    world_size: int
    started_at: str
    finished_at: str | None
    command: str

    @classmethod
    def read(cls, run_dir: Path) -> StageManifest:
        """Read the manifest of a run.

        Raises:
            CheckpointError: If there is none or it is not ours.
        """
        path = run_dir / MANIFEST_FILE
        if not path.is_file():
            raise CheckpointError(
                str(run_dir),
                f"a run directory has a {MANIFEST_FILE}; this one has none.",
                "Name the directory of a run of scripts/train.py, such as runs/stage1.",
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError, ValidationError) as error:
            raise CheckpointError(
                str(path), f"it is not a stage manifest of this version ({error}).", "Restore it from a backup."
            ) from error

    def write(self, run_dir: Path) -> None:
        """Write the manifest; a reader never sees half of it."""
        write_text_atomically(run_dir / MANIFEST_FILE, self.model_dump_json(indent=2) + "\n")


def new_manifest(
    cfg: RunConfig, parent: StageManifest | None, parent_record: ParentRecord | None, command: str, world_size: int
) -> StageManifest:
    """Return the manifest of a stage that is about to start."""
    trained = max(cfg.seq_length, parent.trained_context_length if parent else 0)
    return StageManifest(
        name=cfg.name,
        stage=cfg.stage,
        status="running",
        parent=parent_record,
        model=cfg.model,
        seq_length=cfg.seq_length,
        trained_context_length=trained,
        advertised_context_length=cfg.advertised_context_length or trained,
        rotary_base=cfg.model.rotary_base,
        train_iters=cfg.train.train_iters,
        step=0,
        consumed_train_rows=0,
        consumed_train_tokens=0,
        consumed_target_tokens=0,
        data=_describe_data(cfg.data),
        versions=installed_versions(),
        git_commit=_git_commit(),
        world_size=world_size,
        started_at=utc_now(),
        finished_at=None,
        command=command,
    )


def utc_now() -> str:
    """Return the time as ``2026-11-24T14:00:00Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes; absent ones are left out."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _describe_data(data: DataConfig) -> DataRecord:
    manifest = Path(data.root) / "manifest.json"
    return DataRecord(
        root=data.root,
        tokenizer=data.tokenizer,
        mixture=[entry.model_dump() for entry in data.mixture],
        manifest_sha256=hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
    )


def _git_commit() -> str | None:
    """Return the commit of this checkout, or None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
