"""Which checkpoints are good, and which one is the newest.

Nothing is opened before it is verified. Stages, evaluation and export ask here first. A checkpoint is verified when its
directory holds the files of its manifest and nothing else, with the sizes and SHA-256 of the manifest, when its step is
that of its name and its run that of the directory it lies in.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_prolong.errors import CheckpointError
from nemo_prolong.files import digest_file
from nemo_prolong.records.checkpoint.manifest import (
    CHECKPOINT_MANIFEST,
    COMMON_FILE,
    FORMAT_FILE,
    METADATA_FILE,
    MODEL_FILE,
    RESTORE,
    WEIGHTS,
    CheckpointManifest,
    FileRecord,
    RunIdentity,
    checkpoint_directory,
    listed_steps,
    step_of,
)
from nemo_prolong.units import format_bytes

log = logging.getLogger(__name__)

# How the weights are laid out. Another value would make Megatron read them with other code.
MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_REQUIRED = {MODEL_FILE, METADATA_FILE, COMMON_FILE, FORMAT_FILE}
_SHARD = re.compile(WEIGHTS + r"/__\d+_\d+\.distcp")
_SAMPLE_BYTES = 256 * 2**20
"""What a look at a sample reads, which a slow file system gives within seconds."""

# SHA-256 is bound by the processor. More threads than this wait for the file system.
_MAX_HASH_THREADS = 16


@dataclass(frozen=True)
class CheckpointChoice:
    """The newest good checkpoint of a run.

    Attributes:
        checkpoint: Its directory, or None where the run has no checkpoint at all.
        refused: Why newer ones are not used, by file and reason, newest first.
        summary: What was verified, and how long it took.
    """

    checkpoint: Path | None
    refused: tuple[str, ...] = ()
    summary: str = ""


VerifyCheckpoint = Callable[[Path, RunIdentity | None], CheckpointManifest]
"""Returns the manifest of a checkpoint that is good, and raises CheckpointError for another."""


def choose_checkpoint(
    run_dir: Path, run: RunIdentity | None = None, verify: VerifyCheckpoint | None = None
) -> CheckpointChoice:
    """Return the verified checkpoint of the highest step. The time of a file means nothing.

    Args:
        run_dir: Run directory.
        run: The run that its checkpoints must be of. None reads it from the directory.
        verify: Judges one. By default every file of it is read; ``verify_sample`` reads a part.

    Raises:
        CheckpointError: If there are checkpoints and none of them is good. Nothing is deleted.
    """
    run, refused = run or RunIdentity.of(run_dir), []
    for step in reversed(listed_steps(run_dir)):
        checkpoint, started = checkpoint_directory(run_dir, step), time.perf_counter()
        try:
            manifest = (verify or verify_checkpoint)(checkpoint, run)
        except CheckpointError as error:
            refused.append(f"{error.what}: {error.rule}")
            continue
        size, seconds = format_bytes(manifest.total_bytes), time.perf_counter() - started
        summary = f"verified {checkpoint}: {len(manifest.files)} files, {size} in {seconds:.1f} s"
        return CheckpointChoice(checkpoint, tuple(refused), summary)
    if not refused:
        return CheckpointChoice(None)
    raise CheckpointError(
        str(run_dir / "checkpoints"),
        f"none of its {len(refused)} checkpoints is good. {refused[0]}",
        "Restore one from a backup, or start again under another name=....",
    )


def verify_sample(checkpoint: Path, run: RunIdentity | None = None) -> CheckpointManifest:
    """Compare names and sizes of all files of a checkpoint with the manifest, and the content of the smallest ones.

    It takes seconds. Damage inside of a large file is not seen.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``.
        run: The run it must be of. None accepts any.

    Raises:
        CheckpointError: As ``verify_checkpoint``, for what it reads.
    """
    manifest = check_listing(checkpoint, run)
    sample, read_bytes = [], 0
    for name, record in sorted(manifest.files.items(), key=lambda item: item[1].bytes):
        read_bytes += record.bytes
        if read_bytes > _SAMPLE_BYTES:
            break
        sample.append(name)
    _check_hashes(checkpoint, manifest, sample)
    _check_small_files(checkpoint, manifest)
    return manifest


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the verified checkpoint of the highest step, or None where the run has no checkpoint.

    Newer ones that are damaged are named in warnings.

    Raises:
        CheckpointError: If there are checkpoints and none of them is good.
    """
    choice = choose_checkpoint(run_dir)
    for refusal in choice.refused:
        log.warning("refused %s", refusal)
    if choice.checkpoint is not None:
        log.info(choice.summary)
    return choice.checkpoint


def verify_checkpoint(checkpoint: Path, run: RunIdentity | None = None) -> CheckpointManifest:
    """Read every file of a checkpoint and compare it with the manifest.

    A checkpoint that this process has verified is not read again while its files stay untouched.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``.
        run: The run it must be of. None accepts any.

    Raises:
        CheckpointError: If it is incomplete, damaged or foreign. The error names the file.
    """
    return _verify(checkpoint, run, _fingerprint(checkpoint))


@functools.cache
def _verify(
    checkpoint: Path, run: RunIdentity | None, fingerprint: tuple[tuple[str, int, int, int], ...]
) -> CheckpointManifest:
    manifest = check_listing(checkpoint, run)
    _check_hashes(checkpoint, manifest, manifest.files)
    _check_small_files(checkpoint, manifest)
    return manifest


def _check_hashes(checkpoint: Path, manifest: CheckpointManifest, names: Iterable[str]) -> None:
    """Refuse a file among ``names`` whose content is not that of the manifest."""
    for name, found in hash_files(checkpoint, names).items():
        if found.sha256 != manifest.files[name].sha256:
            raise _refusal(checkpoint / name, "its SHA-256 is not that of the manifest: it was changed or damaged.")


def check_listing(checkpoint: Path, run: RunIdentity | None = None) -> CheckpointManifest:
    """Compare names and sizes with the manifest, without reading the files.

    Raises:
        CheckpointError: As ``verify_checkpoint``, except for what only the content shows.
    """
    manifest = CheckpointManifest.read(checkpoint)
    path = checkpoint / CHECKPOINT_MANIFEST
    if manifest.step != step_of(checkpoint):
        raise _refusal(path, f"foreign: it is of step {manifest.step}, the directory's name says another.")
    if run is not None and manifest.run != run:
        of = f"{manifest.run.name}, started at {manifest.run.started_at}" if manifest.run else "no run"
        raise _refusal(path, f"foreign: it is of {of}, not of {run.name}, started at {run.started_at}.")
    _check_names(checkpoint, manifest)
    for name, expected in manifest.files.items():
        size_bytes = (checkpoint / name).stat().st_size
        if size_bytes != expected.bytes:
            raise _refusal(checkpoint / name, f"it has {size_bytes} bytes, the manifest says {expected.bytes}.")
    return manifest


def _check_names(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Refuse missing files, and files that no checkpoint of this software has. Libraries open some by their name."""
    listed, found = set(manifest.files), list_files(checkpoint)
    for name in sorted(found - listed):
        raise _refusal(checkpoint / name, "foreign: the manifest does not list it.")
    for name in sorted(listed - found):
        raise _refusal(checkpoint / name, "it is missing.")
    for name in sorted(listed):
        if name not in _REQUIRED and not _SHARD.fullmatch(name):
            raise _refusal(checkpoint / name, "foreign: no checkpoint of this software has such a file.")
        if (checkpoint / name).is_symlink() or not (checkpoint / name).is_file():
            raise _refusal(checkpoint / name, "it is not a plain file.")
    for name in sorted(_REQUIRED - listed):
        raise _refusal(checkpoint / CHECKPOINT_MANIFEST, f"it does not list {name}.")


def _check_small_files(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Refuse verified files that contradict the manifest."""
    if _read_json(checkpoint / FORMAT_FILE) != MEGATRON_FORMAT:
        raise _refusal(checkpoint / FORMAT_FILE, "foreign: it asks for another reader than this software's.")
    step = _read_json(checkpoint / MODEL_FILE).get("step")
    if step != manifest.step:
        raise _refusal(checkpoint / MODEL_FILE, f"it is of step {step}, the manifest of {manifest.step}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise _refusal(path, f"foreign: it is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise _refusal(path, "foreign: it is no JSON object.")
    return content


def _refusal(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(str(path), rule, RESTORE)


def list_files(checkpoint: Path) -> set[str]:
    """Return the relative paths of all files below a checkpoint but its manifest.

    What a network file system keeps of a deleted file that was open (``.nfs...``) is no file of ours or anyone's.
    """
    files = (path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(checkpoint).as_posix() for path in files if not path.name.startswith(".nfs")}
    return names - {CHECKPOINT_MANIFEST}


def _fingerprint(checkpoint: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Return what changes when a file is written or replaced. A change of its times by hand shows too."""
    entries = []
    for name in sorted({*list_files(checkpoint), CHECKPOINT_MANIFEST}):
        if (checkpoint / name).exists():
            status = (checkpoint / name).stat()
            entries.append((name, status.st_size, status.st_ctime_ns, status.st_ino))
    return tuple(entries)


def hash_files(root: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Return size and SHA-256 of the files ``names`` below ``root``. Several are read at once.

    Raises:
        CheckpointError: If one cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(min(_MAX_HASH_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(_hash_file, [root / name for name in names]), strict=True))


def _hash_file(path: Path) -> FileRecord:
    try:
        digest = digest_file(path)
    except OSError as error:
        raise CheckpointError(str(path), f"it cannot be read ({error}).", RESTORE) from error
    return FileRecord(sha256=digest.sha256, bytes=digest.num_bytes)
