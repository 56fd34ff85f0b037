"""The quick look at a checkpoint: all names and sizes, and the content of the smallest files up to so many bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint import verify
from nemo_prolong.records.checkpoint.manifest import CheckpointManifest, RunIdentity
from nemo_prolong.records.checkpoint.verify import verify_sample
from tests.support.fake_checkpoint import seal, write_checkpoint

IDENTITY = {"name": "run", "started_at": "2026-11-24T14:00:00Z"}
CHANGED = "its SHA-256 is not that of the manifest"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "stage.json").write_text(json.dumps(IDENTITY))
    return write_checkpoint(tmp_path, 2)


def by_size(checkpoint: Path) -> list[tuple[str, int]]:
    """Return the files with their sizes in bytes, the smallest first."""
    files = CheckpointManifest.read(checkpoint).files
    return sorted(((name, record.bytes) for name, record in files.items()), key=lambda item: item[1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def limit_to(checkpoint: Path, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sample be exactly as large as the smallest ``files``."""
    monkeypatch.setattr(verify, "_SAMPLE_BYTES", sum(size for _, size in by_size(checkpoint)[:files]))


def test_an_undamaged_checkpoint_is_accepted(checkpoint: Path) -> None:
    run = RunIdentity(**IDENTITY)
    assert verify_sample(checkpoint) == verify_sample(checkpoint, run) == CheckpointManifest.read(checkpoint)


@pytest.mark.parametrize("number", range(5))
def test_damage_of_a_small_file_is_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    limit_to(checkpoint, 5, monkeypatch)
    name, _ = by_size(checkpoint)[number]
    flip(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name}: {CHANGED}"):
        verify_sample(checkpoint)


def test_damage_of_large_files_is_not_looked_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(checkpoint, 4, monkeypatch)
    read: list[list[str]] = []
    hash_files = verify.hash_files
    monkeypatch.setattr(verify, "hash_files", lambda path, names: read.append(list(names)) or hash_files(path, names))
    smallest = by_size(checkpoint)
    for name, _ in smallest[4:]:
        flip(checkpoint / name)
    verify_sample(checkpoint)
    assert read == [[name for name, _ in smallest[:4]]]


def test_the_sample_has_a_quarter_of_a_gigabyte() -> None:
    assert verify._SAMPLE_BYTES == 268_435_456


def test_a_size_of_a_large_file_is_compared(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(checkpoint, 1, monkeypatch)
    name, size = by_size(checkpoint)[-1]
    (checkpoint / name).write_bytes(b"short")
    with pytest.raises(CheckpointError, match=f"{name}: it has 5 bytes, the manifest says {size}"):
        verify_sample(checkpoint)


def test_small_files_that_contradict_the_manifest_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.json").write_text('{"step": 5}')
    seal(checkpoint, 2)
    with pytest.raises(CheckpointError, match="it is of step 5, the manifest of 2"):
        verify_sample(checkpoint)


def test_a_checkpoint_of_another_run_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="foreign: it is of run, started at 2026-11-24T14:00:00Z, not of other"):
        verify_sample(checkpoint, RunIdentity(**{**IDENTITY, "name": "other"}))
