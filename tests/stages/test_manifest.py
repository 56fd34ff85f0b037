"""``stage.json``: what a stage that starts says about itself, and what a reader accepts."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemo_prolong
from nemo_prolong.data.storage.remote import read_bytes
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records import stage_manifest as manifest_format
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.stage_manifest import (
    MANIFEST_FILE,
    ParentRecord,
    SettingChange,
    StageManifest,
    installed_versions,
    utc_now,
)
from nemo_prolong.stages.manifest import new_manifest

COMMAND = "python scripts/train.py +exp=tiny"

DATA = DataManifestFile("", None)


@pytest.fixture
def manifest(make_config):
    return new_manifest(make_config(), None, None, COMMAND, 2, DATA)


# A stage that starts.


def test_a_stage_that_starts_has_its_settings_and_no_progress(make_config, manifest):
    cfg = make_config()
    assert (manifest.format, manifest.name, manifest.stage, manifest.status) == (1, "tiny", "base", "running")
    assert (manifest.model, manifest.seq_length, manifest.rotary_base) == (cfg.model, 64, 10000.0)
    assert (manifest.train_iters, manifest.world_size, manifest.command) == (4, 2, COMMAND)
    assert (manifest.step, manifest.consumed_train_rows) == (0, 0)
    assert (manifest.consumed_train_tokens, manifest.consumed_target_tokens) == (0, 0)
    assert (manifest.parent, manifest.finished_at) == (None, None)


@pytest.mark.parametrize(
    ("seq_length", "parent_length", "advertised", "expected"),
    [
        (64, None, None, (64, 64)),
        (256, 64, None, (256, 256)),
        # SFT on short rows: the model keeps what its parent has learned.
        (64, 256, None, (256, 256)),
        (64, 256, 1024, (256, 1024)),
        (64, None, 128, (64, 128)),
    ],
)
def test_the_trained_length_is_the_longest_of_all_stages(seq_length, parent_length, advertised, expected, make_config):
    parent = parent_length and new_manifest(make_config(seq_length=parent_length), None, None, COMMAND, 1, DATA)
    cfg = make_config(seq_length=seq_length, advertised_context_length=advertised)
    manifest = new_manifest(cfg, parent, None, COMMAND, 1, DATA)
    assert (manifest.trained_context_length, manifest.advertised_context_length) == expected


def test_the_trained_length_is_handed_down_twice(make_config):
    long = new_manifest(make_config(seq_length=256), None, None, COMMAND, 1, DATA)
    child = new_manifest(make_config(), long, None, COMMAND, 1, DATA)
    assert new_manifest(make_config(), child, None, COMMAND, 1, DATA).trained_context_length == 256


def test_the_record_of_the_parent_is_kept(make_config):
    record = ParentRecord(path="runs/base", step=4, transition="weights")
    kept = new_manifest(make_config(), None, record, COMMAND, 1, DATA).parent
    assert kept.model_copy(update={"taken": [], "not_taken": []}) == record


def test_the_record_of_the_parent_says_what_was_taken(make_config):
    weights, everything = (
        new_manifest(
            make_config(),
            None,
            ParentRecord(path="runs/base", step=4, transition=kind),
            COMMAND,
            1,
            DATA,
        ).parent
        for kind in ("weights", "weights_and_optimizer")
    )
    optimizer = ["fp32 master weights", "moments of Adam", "step counter of Adam"]
    anew = ["learning-rate schedule", "data position", "random states"]
    assert (everything.taken, everything.not_taken) == (["weights", *optimizer], anew)
    assert (weights.taken, weights.not_taken) == (["weights"], [*optimizer, *anew])


def test_the_data_is_recorded_with_the_hash_of_its_manifest(make_config, data_root):
    (data_root / "manifest.json").write_bytes(b'{"format": 1}')
    found = DataManifestFile.read(str(data_root), read_bytes)
    data = new_manifest(make_config(), None, None, COMMAND, 1, found).data
    assert (data.root, data.tokenizer) == (str(data_root), "tokenizer")
    assert data.mixture == [{"path": "rows", "proportion": 1.0}]
    assert data.manifest_sha256 == hashlib.sha256(b'{"format": 1}').hexdigest()


def test_data_that_others_published_has_no_manifest_to_hash(manifest):
    assert manifest.data.manifest_sha256 is None


def test_the_commit_is_forty_digits_and_none_without_git(make_config, manifest, monkeypatch):
    assert manifest.git_commit is None or re.fullmatch("[0-9a-f]{40}", manifest.git_commit)
    monkeypatch.setenv("PATH", "")
    assert new_manifest(make_config(), None, None, COMMAND, 1, DATA).git_commit is None


def test_versions_are_those_installed(monkeypatch):
    assert installed_versions()["nemo_prolong"] == nemo_prolong.__version__
    monkeypatch.setattr(manifest_format, "_PACKAGES", ("pydantic", "no-such-package", "numpy"))
    assert list(installed_versions()) == ["pydantic", "numpy"]


def test_a_changed_setting_is_said_with_both_values():
    change = SettingChange(step=3, key="optim.lr", before=1e-05, after=2e-05)
    assert str(change) == "optim.lr (1e-05 -> 2e-05)"


def test_times_are_utc_to_the_second():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", utc_now())


# On disk.


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.tuples(*[st.integers(0, 2**62)] * 4),
    name=st.text(max_size=20),
    finished_at=st.none() | st.just("2026-11-24T14:00:00Z"),
)
def test_what_is_written_is_what_is_read(counts, name, finished_at, manifest, tmp_path):
    fields = ("step", "consumed_train_rows", "consumed_train_tokens", "consumed_target_tokens")
    changed = manifest.model_copy(
        update={**dict(zip(fields, counts, strict=True)), "name": name, "finished_at": finished_at}
    )
    changed.write(tmp_path)
    assert StageManifest.read(tmp_path) == changed


def test_writing_replaces_the_file_and_leaves_nothing(manifest, tmp_path):
    run_dir = tmp_path / "run"
    manifest.write(run_dir)
    manifest.model_copy(update={"status": "complete"}).write(run_dir)
    assert [path.name for path in run_dir.iterdir()] == [MANIFEST_FILE]
    assert StageManifest.read(run_dir).status == "complete"


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(CheckpointError) as refusal:
        StageManifest.read(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path}: a run directory has a stage.json; this one has none. "
        "Name the directory of a run of scripts/train.py, such as runs/stage1."
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[: len(text) // 2], "line"),
        (lambda text: "[1]", "must be a mapping"),
        (lambda text: json.dumps({**json.loads(text), "colour": "red"}), "colour"),
        (lambda text: json.dumps({**json.loads(text), "step": "many"}), "step"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "seq_length"}), "seq_length"),
    ],
    ids=["half a file", "no object", "unknown key", "wrong type", "missing key"],
)
def test_a_file_that_is_no_manifest_is_refused_by_path(change, reason, manifest, tmp_path):
    manifest.write(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError) as refusal:
        StageManifest.read(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: it is not a stage manifest of this version (")
    assert reason in message and message.endswith(" Restore it from a backup.")
