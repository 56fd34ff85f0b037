"""``stage.json`` says what a run is, where it came from and what it has seen.

The stages room writes it. Transition, export and report read it, and nobody has to remember a setting. Its format is in
docs/architecture.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nemo_prolong.config.addresses import HF_PREFIX, is_address
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.files import write_text_atomically
from nemo_prolong.records.data_manifest import ChatFormat
from nemo_prolong.records.locations import recorded_path
from nemo_prolong.redaction import redact_values

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
    """The checkpoint a stage started from.

    Attributes:
        path: Run directory, or ``hf:DIR``.
        step: Optimizer steps of the checkpoint. 0 for a Hugging Face directory.
        transition: What was taken.
        sha256: One hash over configuration, index and weights of a Hugging Face directory.
        context_length: Tokens that a Hugging Face directory says its model is made for.
        rotary_base: RoPE base that the weights were trained with. The stage's own may be another.
        stop_token_ids: Tokens that end what its model generates.
        working_directory: Where ``path`` was typed; None in files of earlier versions.
        grown_vocab_rows: Rows that embedding and LM head have and a Hugging Face directory has not. They started as the
            mean of its rows.
        wrappers: What was taken out of the names of a Hugging Face directory's tensors, such as ``_orig_mod``.
        taken: What the stage took, in words.
        not_taken: What it did not take, and started anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    step: int
    transition: str
    sha256: str | None = None
    context_length: int | None = None
    rotary_base: float | None = None
    stop_token_ids: list[int] = []
    working_directory: str | None = None
    grown_vocab_rows: int = 0
    wrappers: list[str] = []
    taken: list[str] = []
    not_taken: list[str] = []

    @property
    def directory(self) -> Path:
        """Where it lies, seen from here."""
        return recorded_path(self.path.removeprefix(HF_PREFIX), self.working_directory)


class SettingChange(BaseModel):
    """A setting that a run was continued with although it was started with another.

    Attributes:
        step: Optimizer steps done with the old value.
        key: As it is typed on the command line.
        before: Old value, in plain JSON types.
        after: New value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} ({self.before} -> {self.after})"


class DataRecord(BaseModel):
    """The data a stage was trained on.

    Attributes:
        root: Directory or address, as it was typed.
        tokenizer: Tokenizer directory, as it was typed.
        mixture: Row sets with their proportions.
        manifest_sha256: Of ``manifest.json``; None where there is none.
        tokenizer_sha256: Of the tokenizer, by that file; None where nothing says which it is.
        working_directory: Where ``root`` was typed; None in files of earlier versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    root: str
    tokenizer: str
    mixture: list[dict[str, Any]]
    manifest_sha256: str | None
    tokenizer_sha256: str | None = None
    working_directory: str | None = None

    @property
    def location(self) -> str:
        """The root, seen from here."""
        return self.root if is_address(self.root) else str(recorded_path(self.root, self.working_directory))

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer's directory, seen from here."""
        return Path(self.tokenizer) if is_address(self.root) else Path(self.location, self.tokenizer)


class StageManifest(BaseModel):
    """The content of ``stage.json``. Counts are of this stage alone.

    ``stop_token_ids`` are the tokens that end what the model generates. The end of a document is the first, then come
    those of the parent and the end of a turn. None stands for files of earlier versions, which do not say it. ``chat``
    is the format of the conversations that the model was trained on, in this stage or before, None where there were
    none.
    """

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
    skipped_steps: int = 0
    changes: list[SettingChange] = []
    data: DataRecord
    stop_token_ids: list[int] | None = None
    chat: ChatFormat | None = None
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
        """Write the manifest, without secrets. A reader never sees half of it."""
        content = redact_values(self.model_dump(mode="json"))
        write_text_atomically(run_dir / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def utc_now() -> str:
    """Return the time as ``2026-11-24T14:00:00Z``."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what a run computes. Absent ones are left out."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
