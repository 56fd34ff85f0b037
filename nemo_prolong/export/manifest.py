"""``export_manifest.json``: which checkpoint a directory was made from, what was compared, and every file's hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from nemo_prolong.export.output import MANIFEST_FILE, SOFTWARE
from nemo_prolong.export.safetensors_file import WrittenFile
from nemo_prolong.export.source import Source
from nemo_prolong.files import write_json_atomically
from nemo_prolong.records.stage_manifest import installed_versions, utc_now


def write_manifest(
    source: Source,
    directory: Path,
    dtype: torch.dtype,
    weights: dict[str, WrittenFile],
    verification: dict[str, Any] | None,
    target: dict[str, Any] | None,
) -> None:
    """Write the manifest of a directory that is otherwise finished.

    Args:
        source: What was exported.
        directory: The directory.
        dtype: Number format of the weights.
        weights: The weight files, hashed while they were written.
        verification: What was compared, or None.
        target: What the directory was prepared for, or None.
    """
    manifest = source.manifest
    write_json_atomically(
        directory / MANIFEST_FILE,
        {
            "format": 1,
            "software": SOFTWARE,
            "source": {
                "run": str(source.run_dir),
                "name": manifest.name,
                "stage": manifest.stage,
                "checkpoint": source.checkpoint.name,
                "step": source.step,
                "git_commit": manifest.git_commit,
            },
            "dtype": str(dtype).removeprefix("torch."),
            "rotary_base": source.model.rotary_base,
            "trained_context_length": manifest.trained_context_length,
            "advertised_context_length": manifest.advertised_context_length,
            "verification": verification,
            "target": target,
            "versions": installed_versions(),
            "exported_at": utc_now(),
            "files": _describe_files(directory, weights),
        },
    )


def _describe_files(directory: Path, weights: dict[str, WrittenFile]) -> dict[str, dict[str, Any]]:
    """Return hash and size of every file by name."""
    files = {}
    for path in sorted(directory.iterdir()):
        written = weights.get(path.name) or _hash_file(path)
        files[path.name] = {"sha256": written.sha256, "bytes": written.num_bytes}
    return files


def _hash_file(path: Path) -> WrittenFile:
    with path.open("rb") as file:
        return WrittenFile(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
