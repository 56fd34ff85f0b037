"""Make ``export_manifest.json`` of a directory that is otherwise finished."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_prolong.export.hf_config import CHAT_TEMPLATE_FILE, SpecialTokens
from nemo_prolong.export.source import ExportSource
from nemo_prolong.files import FileDigest, digest_file
from nemo_prolong.records.export_manifest import (
    ExportedFile,
    ExportManifest,
    SourceRecord,
    TargetRecord,
    VerificationRecord,
)
from nemo_prolong.records.stage_manifest import installed_versions, utc_now


def write_manifest(
    source: ExportSource,
    special: SpecialTokens,
    directory: Path,
    dtype: torch.dtype,
    weights: dict[str, FileDigest],
    verification: VerificationRecord | None,
    target: TargetRecord | None,
) -> None:
    """Write the manifest of a directory.

    Args:
        source: What was exported.
        special: What ends the texts of its model.
        directory: The directory.
        dtype: Number format of the weights.
        weights: The weight files, hashed while they were written.
        verification: What was compared, or None.
        target: What the directory was prepared for, or None.
    """
    manifest = source.manifest
    ExportManifest(
        source=SourceRecord(
            run=str(source.run_dir),
            name=manifest.name,
            stage=manifest.stage,
            checkpoint=source.checkpoint.name,
            step=source.step,
            git_commit=manifest.git_commit,
        ),
        dtype=str(dtype).removeprefix("torch."),
        rotary_base=source.model.rotary_base,
        trained_context_length=manifest.trained_context_length,
        advertised_context_length=manifest.advertised_context_length,
        stop_token_ids=list(special.stop_ids),
        chat_template_sha256=_chat_template_sha256(directory),
        chat_date=manifest.chat.date if manifest.chat is not None else None,
        verification=verification,
        target=target,
        versions=installed_versions(),
        exported_at=utc_now(),
        files=_describe_files(directory, weights),
    ).write(directory)


def _chat_template_sha256(directory: Path) -> str | None:
    path = directory / CHAT_TEMPLATE_FILE
    return digest_file(path).sha256 if path.is_file() else None


def _describe_files(directory: Path, weights: dict[str, FileDigest]) -> dict[str, ExportedFile]:
    """Return hash and size of every file by name; only files that are not in ``weights`` are read."""
    digests = {path.name: weights.get(path.name) or digest_file(path) for path in sorted(directory.iterdir())}
    return {name: ExportedFile(sha256=sha256, num_bytes=size) for name, (sha256, size) in digests.items()}
