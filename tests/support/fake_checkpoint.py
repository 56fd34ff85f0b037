"""Checkpoints as the rooms without torch see them: the right files, with a manifest, and no weights in them."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_prolong.records.checkpoint.manifest import CheckpointManifest, RunIdentity, checkpoint_directory
from nemo_prolong.records.checkpoint.verify import hash_files, list_files

# As megatron-core 0.15.3 writes it.
MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_checkpoint(run_dir: Path, step: int) -> Path:
    """Write a complete checkpoint of the run, with files of a few bytes."""
    checkpoint = checkpoint_directory(run_dir, step)
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "model.json").write_text(json.dumps({"step": step}))
    (checkpoint / "weights" / "metadata.json").write_text(json.dumps(MEGATRON_FORMAT))
    for name in (".metadata", "common.pt", "__0_0.distcp", "__0_1.distcp", "__1_0.distcp"):
        (checkpoint / "weights" / name).write_bytes(f"{name} of step {step}".encode() * 40)
    seal(checkpoint, step)
    return checkpoint


def seal(checkpoint: Path, step: int) -> None:
    """Write a manifest of the files that are there."""
    CheckpointManifest(
        step=step,
        run=RunIdentity.of(checkpoint.parents[1]),
        layout={"world_size": 2},
        versions={"nemo_prolong": "0.1.0"},
        saved_at="2026-11-24T14:00:00Z",
        files=hash_files(checkpoint, sorted(list_files(checkpoint))),
    ).write(checkpoint)
