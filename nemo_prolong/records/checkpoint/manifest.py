"""``manifest.json`` of a checkpoint says what it is, and has the SHA-256 of every file of it.

It is written last. A checkpoint directory without one is a save that did not finish. One whose files are not those of
its manifest is damaged. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from nemo_prolong.errors import CheckpointError
from nemo_prolong.files import sync, write_text_atomically
from nemo_prolong.records.stage_manifest import MANIFEST_FILE as STAGE_FILE

CHECKPOINT_MANIFEST = "manifest.json"
MODEL_FILE = "model.json"
WEIGHTS = "weights"
FORMAT_FILE = f"{WEIGHTS}/metadata.json"
METADATA_FILE = f"{WEIGHTS}/.metadata"
COMMON_FILE = f"{WEIGHTS}/common.pt"

RESTORE = "Restore it from a backup, or delete the checkpoint: the newest good one before it is used."

_STEP_DIRECTORY = re.compile(r"step_(\d{8})")


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint after ``step`` optimizer steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def listed_steps(run_dir: Path) -> list[int]:
    """Return the steps of all checkpoint directories, ascending, whatever is in them."""
    matches = (_STEP_DIRECTORY.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("*"))
    return sorted(int(match[1]) for match in matches if match)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps of a checkpoint directory.

    >>> step_of(Path("runs/stage1/checkpoints/step_00005000"))
    5000
    """
    match = _STEP_DIRECTORY.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


class FileRecord(BaseModel):
    """Size and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bytes: int
    sha256: str


class RunIdentity(BaseModel):
    """The run that wrote a checkpoint. A name can be given twice, a name and a start cannot."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    started_at: str

    @classmethod
    def of(cls, run_dir: Path) -> RunIdentity | None:
        """Return the run of a directory by its ``stage.json``, or None where that cannot be read."""
        try:
            stage = json.loads((run_dir / STAGE_FILE).read_text())
            return cls(name=stage["name"], started_at=stage["started_at"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


class CheckpointManifest(BaseModel):
    """The content of a checkpoint's ``manifest.json``. Paths in ``files`` are relative to the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    software: Literal["nemo_prolong"] = "nemo_prolong"
    step: int
    run: RunIdentity | None
    layout: dict[str, int]
    versions: dict[str, str]
    saved_at: str
    files: dict[str, FileRecord]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.files.values())

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointManifest:
        """Read the manifest of a checkpoint directory.

        Raises:
            CheckpointError: If there is none, or it is not as it was written.
        """
        path = checkpoint / CHECKPOINT_MANIFEST
        try:
            content = json.loads(path.read_text())
            digest = content.pop("sha256")
            if digest != _digest(content):
                raise ValueError("its own sha256 does not match its content")
            return cls.model_validate_json(json.dumps(content))
        except FileNotFoundError as error:
            rule = f"there is no {CHECKPOINT_MANIFEST}: it was not saved completely, or not by this version."
            raise CheckpointError(str(checkpoint), rule, RESTORE) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(str(path), f"it is not as it was written ({reason}).", RESTORE) from error

    def write(self, checkpoint: Path) -> None:
        """Write the manifest by rename, after which the directory's entries are on disk too."""
        content = self.model_dump(mode="json")
        text = json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"
        write_text_atomically(checkpoint / CHECKPOINT_MANIFEST, text)
        sync(checkpoint)


def _digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the manifest's content in one spelling of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
