"""The manifest of a stage that is about to start. Its format is in ``records.stage_manifest``."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from nemo_prolong.config.schema import DataConfig, RunConfig, Transition
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.locations import working_directory
from nemo_prolong.records.stage_manifest import (
    DataRecord,
    ParentRecord,
    SettingChange,
    StageManifest,
    installed_versions,
    utc_now,
)
from nemo_prolong.stages.stop_tokens import UNKNOWN_STOP_TOKENS, StopTokens

_ANEW = ("learning-rate schedule", "data position", "random states")
_OPTIMIZER = ("fp32 master weights", "moments of Adam", "step counter of Adam")
_TAKEN = {Transition.WEIGHTS: ("weights",), Transition.WEIGHTS_AND_OPTIMIZER: ("weights", *_OPTIMIZER)}
_NOT_TAKEN = {Transition.WEIGHTS: (*_OPTIMIZER, *_ANEW), Transition.WEIGHTS_AND_OPTIMIZER: _ANEW}


def new_manifest(
    cfg: RunConfig,
    before: StageManifest | None,
    parent_record: ParentRecord | None,
    command: str,
    world_size: int,
    data: DataManifestFile,
    stops: StopTokens = UNKNOWN_STOP_TOKENS,
) -> StageManifest:
    """Return the manifest of a stage that is about to start.

    Args:
        cfg: The stage.
        before: Manifest of its parent, or of the run itself where it is resumed. None where there is neither.
        parent_record: What it takes from its parent.
        command: What was typed.
        world_size: Number of ranks.
        data: Manifest of its data directory.
        stops: What ends the texts that its model generates.
    """
    from_elsewhere = parent_record.context_length if parent_record else None
    trained = max(cfg.seq_length, before.trained_context_length if before else from_elsewhere or 0)
    return StageManifest(
        name=cfg.name,
        stage=cfg.stage,
        status="running",
        parent=_with_what_is_taken(parent_record) if parent_record else None,
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
        data=_describe_data(cfg.data, data),
        stop_token_ids=list(stops.stop_token_ids),
        chat=stops.chat,
        versions=installed_versions(),
        git_commit=_git_commit(),
        world_size=world_size,
        started_at=utc_now(),
        finished_at=None,
        command=command,
    )


def continued(
    manifest: StageManifest, before: StageManifest, step: int, changes: Sequence[SettingChange]
) -> StageManifest:
    """Return the manifest of a run that goes on.

    Args:
        manifest: Of the run as it is configured now.
        before: As the run was left. Its start, what it took from its parent and what ends its texts stay as they were.
        step: Steps of the checkpoint it goes on from.
        changes: Settings that are not as they were.
    """
    return manifest.model_copy(
        update={
            "started_at": before.started_at,
            "parent": before.parent,
            "stop_token_ids": before.stop_token_ids,
            "chat": before.chat,
            "step": step,
            # A process that was killed between the two files of a start has recorded a change already.
            "changes": [*before.changes, *(change for change in changes if change not in before.changes)],
        }
    )


def _with_what_is_taken(record: ParentRecord) -> ParentRecord:
    transition = Transition(record.transition)
    return record.model_copy(update={"taken": list(_TAKEN[transition]), "not_taken": list(_NOT_TAKEN[transition])})


def _describe_data(data: DataConfig, manifest: DataManifestFile) -> DataRecord:
    return DataRecord(
        root=data.root,
        tokenizer=data.tokenizer,
        mixture=[entry.model_dump() for entry in data.mixture],
        manifest_sha256=manifest.sha256,
        tokenizer_sha256=manifest.tokenizer_sha256,
        working_directory=working_directory(),
    )


def _git_commit() -> str | None:
    """Return the commit of this checkout, or None where it is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
