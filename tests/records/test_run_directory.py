"""Where everything of a run lies, and what is read and written there."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    RunIdentity,
    checkpoint_directory,
    listed_steps,
)
from nemo_prolong.records.checkpoint.model_description import ModelDescription
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import EventRecord, Goodput, StepRecord
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.tiny import tiny_config

STEP = {"loss": 2.0, "real_tokens": 8, "consumed_train_tokens": 8, "step_seconds": 4.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The directory of a run that does not exist yet."""
    return RunDirectory(tmp_path / "runs" / "tiny")


@pytest.fixture
def manifest(tmp_path: Path) -> StageManifest:
    """What a stage that resumes after 2 steps says of itself."""
    cfg = tiny_config(tmp_path / "data", tmp_path / "runs")
    return StageManifest(
        name="tiny",
        stage="base",
        status="running",
        parent=None,
        model=cfg.model,
        seq_length=64,
        trained_context_length=64,
        advertised_context_length=64,
        rotary_base=1e4,
        train_iters=4,
        step=2,
        consumed_train_rows=8,
        consumed_train_tokens=512,
        consumed_target_tokens=500,
        data={"root": "data", "tokenizer": "tokenizer", "mixture": [], "manifest_sha256": None},
        versions={},
        git_commit=None,
        world_size=1,
        started_at="2026-11-24T14:00:00Z",
        finished_at=None,
        command="train",
    )


def test_every_file_of_a_run_has_its_place(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    places = {
        "metrics.jsonl": run.metrics_file,
        "events.jsonl": run.events_file,
        "overrides.txt": run.overrides_file,
        "tensorboard": run.tensorboard,
        "tracker_ids": run.tracker_ids,
        "train.log": run.log_file(0),
        "train.rank3.log": run.log_file(3),
        "stacks.rank3.txt": run.stacks_file(3),
    }
    assert places == {name: tmp_path / name for name in places}
    assert checkpoint_directory(tmp_path, 1234) == tmp_path / "checkpoints" / "step_00001234"


def test_a_run_has_begun_when_manifest_and_configuration_are_there(run: RunDirectory, manifest: StageManifest) -> None:
    assert not run.has_manifest and not run.is_run
    run.path.mkdir(parents=True)
    (run.path / "config.json").write_text("{}")
    assert not run.has_manifest and not run.is_run
    run.write_manifest(manifest)
    assert run.has_manifest and run.is_run
    (run.path / "config.json").unlink()
    assert run.has_manifest and not run.is_run


def test_a_start_writes_what_a_reader_needs(run: RunDirectory, manifest: StageManifest) -> None:
    run.write_start(manifest, ["+exp=tiny", "tracker.wandb.api_key=hf_abcdefghijklmnopqrstuvwxyz0123456789"], {"a": 1})
    assert run.manifest is manifest and run.config == {"a": 1}
    again = RunDirectory(run.path)
    assert again.manifest == manifest and again.config == {"a": 1} and again.is_run
    first, second = run.overrides_file.read_text().splitlines()
    assert first == "+exp=tiny"
    assert second.startswith("tracker.wandb.api_key=") and "abcdefghijklmnopqrstuvwxyz" not in second


def test_a_start_drops_the_records_of_steps_that_come_again(run: RunDirectory, manifest: StageManifest) -> None:
    run.path.mkdir(parents=True)
    for step in (1, 2, 3):
        run.append_metrics(StepRecord(step=step, **STEP))
    run.write_start(manifest, [], {})
    assert [record.step for record in run.metrics().records] == [1, 2]


def test_manifest_and_configuration_are_read_once(run: RunDirectory, manifest: StageManifest) -> None:
    run.write_start(manifest, [], {"a": 1})
    again = RunDirectory(run.path)
    assert (again.manifest.step, again.config) == (2, {"a": 1})
    run.write_manifest(manifest.model_copy(update={"step": 4}))
    (run.path / "config.json").write_text("{}")
    for one, step in ((again, 2), (run, 4)):
        assert (one.manifest.step, one.config) == (step, {"a": 1})


def test_the_identity_is_that_of_the_manifest(run: RunDirectory, manifest: StageManifest) -> None:
    assert run.identity is None
    run.path.mkdir(parents=True)
    expected = RunIdentity(name="tiny", started_at="2026-11-24T14:00:00Z")
    manifest.write(run.path)
    assert run.identity == RunIdentity.of(run.path) == expected
    # It is that of the manifest that was read, whatever the file says by now.
    assert run.manifest == manifest
    (run.path / "stage.json").unlink()
    assert run.identity == expected
    assert RunDirectory(run.path).identity is None


@pytest.mark.parametrize("content", ["", "[]", "3", '{"name": "a"}', '{"name": 1, "started_at": "b"}'])
def test_a_run_whose_manifest_cannot_be_read_has_no_identity(run: RunDirectory, content: str) -> None:
    run.path.mkdir(parents=True)
    (run.path / "stage.json").write_text(content)
    assert run.identity is None


def test_an_event_has_its_time_and_no_secret(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.path.mkdir(parents=True)
    monkeypatch.setattr(time, "time", lambda: 1234.56789)
    run.record_event(3, "checkpoint_failed", "no answer of s3://key:secret-of-mine@host")
    (event,) = run.events().records
    assert (event.time, event.step, event.event) == (1234.568, 3, "checkpoint_failed")
    assert event.detail.startswith("no answer of s3://") and "secret-of-mine" not in event.detail


def test_an_event_that_cannot_be_written_is_logged(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    run.record_event(3, "hang", "nothing")
    (message,) = caplog.messages
    assert "'step': 3, 'event': 'hang', 'detail': 'nothing'} could not be recorded: [Errno 2]" in message


def test_metrics_that_cannot_be_written_are_an_error(run: RunDirectory) -> None:
    with pytest.raises(FileNotFoundError):
        run.append_metrics(StepRecord(step=1, **STEP))


def test_goodput_is_that_of_all_records(run: RunDirectory) -> None:
    assert run.goodput() is None
    run.path.mkdir(parents=True)
    EventRecord(time=100.0, step=0, event="started", detail="").append_to(run.events_file)
    run.append_metrics(StepRecord(step=1, time=108.0, **STEP))
    assert run.goodput() == Goodput(4.0, 100.0, 108.0)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_only_directories_named_by_a_step_are_listed(tmp_path: Path) -> None:
    assert listed_steps(tmp_path) == []
    for name in (
        "step_00000010",
        "step_00000002",
        "step_0000003",
        "step_00000004.writing-1",
        "xstep_00000005",
        "notes",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert listed_steps(tmp_path) == [2, 10]


def test_a_checkpoint_manifest_is_written_key_by_key(tmp_path: Path) -> None:
    manifest = CheckpointManifest(
        step=2,
        run=RunIdentity(name="tiny", started_at="2026"),
        layout={"world_size": 1},
        versions={"torch": "2"},
        saved_at="2027",
        files={"a": FileRecord(bytes=3, sha256="00"), "b": FileRecord(bytes=4, sha256="11")},
    )
    manifest.write(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert len(content.pop("sha256")) == 64
    assert content == {
        "format": 1,
        "software": "nemo_prolong",
        "step": 2,
        "run": {"name": "tiny", "started_at": "2026"},
        "layout": {"world_size": 1},
        "versions": {"torch": "2"},
        "saved_at": "2027",
        "files": {"a": {"bytes": 3, "sha256": "00"}, "b": {"bytes": 4, "sha256": "11"}},
    }
    assert CheckpointManifest.read(tmp_path) == manifest and manifest.total_bytes == 7


def test_the_hash_of_a_checkpoint_manifest_is_that_of_every_version(tmp_path: Path) -> None:
    """Another way to spell the JSON would refuse every checkpoint that was written before."""
    manifest = CheckpointManifest(step=2, run=None, layout={}, versions={}, saved_at="2027", files={})
    manifest.write(tmp_path)
    digest = json.loads((tmp_path / "manifest.json").read_text())["sha256"]
    assert digest == "a9b324ad026171b48ae29a32f44116dcef8bca33e6721e8d67e3bf94378cae8a"


def test_a_manifest_and_its_entry_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    CheckpointManifest(step=2, run=None, layout={}, versions={}, saved_at="2027", files={}).write(tmp_path)
    assert len(synced) > 1 and synced[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format Input should be 1"),
        ({"software": "other"}, "software Input should be 'nemo_prolong'"),
        ({"more": 1}, "more Extra inputs are not permitted"),
        ({"step": "2"}, "step Input should be a valid integer"),
        ({"run": {"name": "a", "started_at": "b", "more": 1}}, "run.more Extra inputs are not permitted"),
        ({"run": {"name": 1, "started_at": "b"}}, "run.name Input should be a valid string"),
        ({"files": {"a": {"bytes": "3", "sha256": "0"}}}, "files.a.bytes Input should be a valid integer"),
        ({"files": {"a": {"bytes": 3, "sha256": "0", "x": 1}}}, "files.a.x Extra inputs are not permitted"),
    ],
)
def test_a_sealed_manifest_of_another_format_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = CheckpointManifest(step=2, run=None, layout={}, versions={}, saved_at="2027", files={})
    # As if that software had sealed it.
    monkeypatch.setattr(
        CheckpointManifest, "model_dump", lambda self, mode: {**json.loads(self.model_dump_json()), **change}
    )
    manifest.write(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        CheckpointManifest.read(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: it is not as it was written (") and reason in message


def test_a_manifest_that_does_not_match_its_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"sha256": "0"}')
    with pytest.raises(CheckpointError) as caught:
        CheckpointManifest.read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'manifest.json'}: it is not as it was written (its own sha256 does not match its content). "
        "Restore it from a backup, or delete the checkpoint: the newest good one before it is used."
    )
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        CheckpointManifest.read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: there is no manifest.json: it was not saved completely, or not by this version. Restore it from "
        "a backup, or delete the checkpoint: the newest good one before it is used."
    )


def test_the_model_of_a_checkpoint_is_that_of_its_stage(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "data", tmp_path / "runs")
    description = ModelDescription.of_run(cfg, 7)
    assert description == ModelDescription(
        step=7,
        model=cfg.model.model_dump(mode="json"),
        seq_length=64,
        tokenizer=str(tmp_path / "data" / "tokenizer"),
        compute="fp32",
        working_directory=str(Path.cwd()),
    )
    assert description.model_config == cfg.model
    (tmp_path / "model.json").write_text(json.dumps(vars(description)))
    assert ModelDescription.read(tmp_path) == description


@pytest.mark.parametrize("content", [None, "", "[]", '{"step": 1}'])
def test_a_model_that_cannot_be_read_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        ModelDescription.read(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model.json'}: a checkpoint of this software has a readable model.json (")
    assert message.endswith("). Name a run directory that scripts/train.py wrote.")
