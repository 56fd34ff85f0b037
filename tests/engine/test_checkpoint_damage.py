"""A damaged, partial or foreign checkpoint is refused by name, and the one before it is used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.checkpoint import verify
from nemo_prolong.records.checkpoint.manifest import CheckpointManifest, RunIdentity, checkpoint_directory
from nemo_prolong.records.checkpoint.retention import (
    delete_checkpoint,
    publish_checkpoint,
    remove_leftovers,
    superseded,
)
from nemo_prolong.records.checkpoint.verify import (
    CheckpointChoice,
    choose_checkpoint,
    newest_checkpoint,
    verify_checkpoint,
)
from nemo_prolong.units import format_bytes
from tests.support.fake_checkpoint import seal, write_checkpoint

FILES = (
    "model.json",
    "weights/.metadata",
    "weights/common.pt",
    "weights/metadata.json",
    "weights/__0_0.distcp",
    "weights/__0_1.distcp",
    "weights/__1_0.distcp",
)
CHANGED = "its SHA-256 is not that of the manifest: it was changed or damaged."
NOT_WRITTEN = "it is not as it was written ("


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def truncate(path: Path, size_bytes: int) -> None:
    os.truncate(path, size_bytes)


def swap(checkpoint: Path, first: str, second: str) -> None:
    (checkpoint / first).rename(checkpoint / "aside")
    (checkpoint / second).rename(checkpoint / first)
    (checkpoint / "aside").rename(checkpoint / second)


def edit_manifest(checkpoint: Path, old: str, new: str) -> None:
    path = checkpoint / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def swap_hashes(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    files = content["files"]
    files[FILES[4]], files[FILES[5]] = files[FILES[5]], files[FILES[4]]
    path.write_text(json.dumps(content))


def rename_step(checkpoint: Path) -> None:
    """Give an older checkpoint the name of a newer step."""
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint_directory(checkpoint.parents[1], 2), checkpoint)


def of_another_run(checkpoint: Path) -> None:
    run = checkpoint.parents[2] / "another"
    run.mkdir()
    (run / "stage.json").write_text(json.dumps({"name": "another", "started_at": "2026-01-01T00:00:00Z"}))
    shutil.rmtree(checkpoint)
    write_checkpoint(run, 4).rename(checkpoint)


def newer_shard_of_another_save(checkpoint: Path) -> None:
    older = checkpoint_directory(checkpoint.parents[1], 2)
    shutil.copy(older / FILES[4], checkpoint / FILES[4])


def link(checkpoint: Path) -> None:
    target = checkpoint.parents[2] / "elsewhere"
    (checkpoint / FILES[4]).rename(target)
    (checkpoint / FILES[4]).symlink_to(target)


def resealed(checkpoint: Path, name: str, content: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text(content)
    seal(checkpoint, 4)


def stop_after(checkpoint: Path, count: int) -> None:
    """Leave what a save that was stopped after ``count`` files would leave under the final name."""
    for name in (*FILES[count:], "manifest.json"):
        (checkpoint / name).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    **{f"one bit of {name}": (lambda c, n=name: flip(c / n, 7), name, CHANGED) for name in FILES},
    **{f"last bit of {name}": (lambda c, n=name: flip(c / n, -1), name, CHANGED) for name in FILES},
    **{f"{name} half": (lambda c, n=name: truncate(c / n, 5), name, "it has 5 bytes, the manifest") for name in FILES},
    **{f"{name} empty": (lambda c, n=name: truncate(c / n, 0), name, "it has 0 bytes, the manifest") for name in FILES},
    **{f"{name} deleted": (lambda c, n=name: (c / n).unlink(), name, "it is missing.") for name in FILES},
    **{
        f"stopped after {n} files": (lambda c, n=n: stop_after(c, n), "", "there is no manifest.json") for n in range(8)
    },
    "shards of two ranks swapped": (lambda c: swap(c, FILES[4], FILES[6]), FILES[4], CHANGED),
    "shards of one rank swapped": (lambda c: swap(c, FILES[4], FILES[5]), FILES[4], CHANGED),
    "a shard of an older save": (newer_shard_of_another_save, FILES[4], CHANGED),
    "shard and manifest swapped": (lambda c: swap(c, FILES[4], "manifest.json"), "manifest.json", NOT_WRITTEN),
    "a shard too many": (
        lambda c: (c / "weights/__9_0.distcp").touch(),
        "weights/__9_0.distcp",
        "foreign: the manifest",
    ),
    "a shard that is a link": (link, FILES[4], "it is not a plain file."),
    "manifest deleted": (lambda c: (c / "manifest.json").unlink(), "", "there is no manifest.json"),
    "manifest empty": (lambda c: truncate(c / "manifest.json", 0), "manifest.json", NOT_WRITTEN),
    "manifest half": (lambda c: truncate(c / "manifest.json", 300), "manifest.json", NOT_WRITTEN),
    "manifest a list": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json", NOT_WRITTEN),
    "manifest not UTF-8": (lambda c: (c / "manifest.json").write_bytes(b"\xff"), "manifest.json", NOT_WRITTEN),
    "manifest edited: step": (lambda c: edit_manifest(c, '"step": 4', '"step": 6'), "manifest.json", NOT_WRITTEN),
    "manifest edited: size": (lambda c: edit_manifest(c, '"bytes": ', '"bytes": 1'), "manifest.json", NOT_WRITTEN),
    "manifest edited: file": (lambda c: edit_manifest(c, "__1_0", "__2_0"), "manifest.json", NOT_WRITTEN),
    "manifest edited: version": (lambda c: edit_manifest(c, "0.1.0", "0.1.1"), "manifest.json", NOT_WRITTEN),
    "manifest edited: hashes": (swap_hashes, "manifest.json", NOT_WRITTEN),
    "directory of another step": (rename_step, "manifest.json", "foreign: it is of step 2, the directory's name"),
    "checkpoint of another run": (of_another_run, "manifest.json", "foreign: it is of another, started at 2026-01-01"),
    "another reader asked for": (
        lambda c: resealed(c, FILES[3], '{"sharded_backend": "zarr"}'),
        FILES[3],
        "foreign: it asks for another reader",
    ),
    "model of another step": (
        lambda c: resealed(c, FILES[0], '{"step": 5}'),
        FILES[0],
        "it is of step 5, the manifest",
    ),
    **{
        f"{name} resealed as {content or 'nothing'}": (lambda c, n=name, t=content: resealed(c, n, t), name, rule)
        for name in (FILES[0], FILES[3])
        for content, rule in (("", "foreign: it is no JSON ("), ("[]", "foreign: it is no JSON object."))
    },
    "a configuration to build objects from": (
        lambda c: resealed(c, "context/io.json", "{}"),
        "context/io.json",
        "foreign: no checkpoint of this software has such a file.",
    ),
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stage.json").write_text(json.dumps({"name": "run", "started_at": "2026-11-24T14:00:00Z"}))
    for step in (2, 4):
        write_checkpoint(run, step)
    return run


def test_a_manifest_that_was_verified_cannot_be_changed(run_dir: Path) -> None:
    # The next verification of untouched files returns the same object.
    manifest = verify_checkpoint(checkpoint_directory(run_dir, 2))
    for record, field in [(manifest, "step"), (manifest.files[FILES[0]], "bytes")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(record, field, 1)


def test_there_are_at_least_forty_damages() -> None:
    assert len(DAMAGES) >= 40


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_refused_by_file_with_its_reason(run_dir: Path, damage: str) -> None:
    newest = checkpoint_directory(run_dir, 4)
    assert choose_checkpoint(run_dir).checkpoint == newest
    inflict, file, reason = DAMAGES[damage]
    inflict(newest)
    choice = choose_checkpoint(run_dir)
    assert choice.checkpoint == checkpoint_directory(run_dir, 2)
    (refusal,) = choice.refused
    assert refusal.startswith(f"{newest / file}: {reason}"), refusal
    assert newest.is_dir()


def test_the_highest_step_counts_not_the_time_of_files(run_dir: Path) -> None:
    for path in [checkpoint_directory(run_dir, 2), *checkpoint_directory(run_dir, 2).rglob("*")]:
        os.utime(path, (2e9, 2e9))
    assert choose_checkpoint(run_dir).checkpoint == checkpoint_directory(run_dir, 4)


def test_reading_a_run_warns_of_the_damaged_checkpoint_and_why(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = checkpoint_directory(run_dir, 4) / FILES[4]
    flip(shard, 3)
    assert newest_checkpoint(run_dir) == checkpoint_directory(run_dir, 2)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == f"refused {shard}: {CHANGED}"


def test_a_damage_after_a_verification_is_seen(run_dir: Path) -> None:
    checkpoint = checkpoint_directory(run_dir, 4)
    verify_checkpoint(checkpoint)
    shard = checkpoint / FILES[5]
    status = shard.stat()
    flip(shard, 3)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match="its SHA-256 is not that of the manifest"):
        verify_checkpoint(checkpoint)


def test_what_network_file_systems_keep_of_files_is_ignored(run_dir: Path) -> None:
    (checkpoint_directory(run_dir, 4) / "weights" / ".nfs0000000000000001").touch()
    assert choose_checkpoint(run_dir).checkpoint == checkpoint_directory(run_dir, 4)


def test_what_was_verified_is_said_with_its_size_and_time(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([10.0, 12.34])
    monkeypatch.setattr(verify.time, "perf_counter", lambda: next(times))
    checkpoint = checkpoint_directory(run_dir, 4)
    size = format_bytes(CheckpointManifest.read(checkpoint).total_bytes)
    with caplog.at_level(logging.INFO):
        assert newest_checkpoint(run_dir) == checkpoint
    assert caplog.messages == [f"verified {checkpoint}: 7 files, {size} in 2.3 s"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path) == CheckpointChoice(None, (), "")
    assert newest_checkpoint(tmp_path) is None


def test_a_run_of_which_no_checkpoint_is_good_is_refused(run_dir: Path) -> None:
    for step, name in ((2, FILES[5]), (4, FILES[4])):
        flip(checkpoint_directory(run_dir, step) / name, 3)
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(run_dir)
    newest = checkpoint_directory(run_dir, 4) / FILES[4]
    assert str(caught.value) == (
        f"{run_dir / 'checkpoints'}: none of its 2 checkpoints is good. {newest}: {CHANGED} Restore one from a backup, "
        "or start again under another name=...."
    )
    assert names(sorted((run_dir / "checkpoints").iterdir())) == ["step_00000002", "step_00000004"]


def test_the_run_that_is_named_counts_not_that_of_the_directory(run_dir: Path) -> None:
    another = RunIdentity(name="another", started_at="2026")
    with pytest.raises(CheckpointError, match="foreign: it is of run, started at 2026-11-24T14:00:00Z, not of another"):
        choose_checkpoint(run_dir, another)


def test_a_checkpoint_of_no_run_is_foreign(run_dir: Path) -> None:
    (run_dir / "stage.json").rename(run_dir / "aside")
    seal(checkpoint_directory(run_dir, 4), 4)
    (run_dir / "aside").rename(run_dir / "stage.json")
    (refusal,) = choose_checkpoint(run_dir).refused
    assert refusal.endswith("foreign: it is of no run, not of run, started at 2026-11-24T14:00:00Z.")


def test_a_manifest_that_does_not_list_a_file_that_is_needed_is_refused(run_dir: Path) -> None:
    checkpoint = checkpoint_directory(run_dir, 4)
    (checkpoint / FILES[2]).unlink()
    seal(checkpoint, 4)
    assert choose_checkpoint(run_dir).refused == (f"{checkpoint / 'manifest.json'}: it does not list {FILES[2]}.",)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, digest = checkpoint_directory(run_dir, 4) / FILES[4], verify.digest_file

    def fail(path: Path) -> object:
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(verify, "digest_file", fail)
    choice = choose_checkpoint(run_dir)
    assert choice.checkpoint == checkpoint_directory(run_dir, 2)
    assert choice.refused == (f"{broken}: it cannot be read ([Errno 5] Input/output error).",)


# Retention.


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_newest_and_the_permanent_checkpoints_are_kept(run_dir: Path) -> None:
    for step in (6, 8, 10):
        write_checkpoint(run_dir, step)
    newest = checkpoint_directory(run_dir, 10)
    assert names(superseded(run_dir, newest, 2, None)) == ["step_00000002", "step_00000004", "step_00000006"]
    assert names(superseded(run_dir, newest, 1, 4)) == ["step_00000002", "step_00000006"]
    # A partial one is no substitute for a complete one.
    (checkpoint_directory(run_dir, 8) / "manifest.json").unlink()
    assert names(superseded(run_dir, newest, 2, None)) == ["step_00000002", "step_00000004", "step_00000008"]
    # Steps after the one just saved are a run's that was continued from before them.
    assert names(superseded(run_dir, checkpoint_directory(run_dir, 4), 1, None)) == ["step_00000002"]


def test_a_refused_checkpoint_is_not_kept_for_a_good_one(run_dir: Path) -> None:
    write_checkpoint(run_dir, 6)
    flip(checkpoint_directory(run_dir, 4) / FILES[4], 3)
    newest = checkpoint_directory(run_dir, 6)
    # Its files and sizes are right: only reading it showed the damage.
    assert names(superseded(run_dir, newest, 2, None)) == ["step_00000002"]
    assert names(superseded(run_dir, newest, 2, None, refused={4})) == ["step_00000004"]


def test_nothing_is_deleted_before_the_newest_is_complete(run_dir: Path) -> None:
    (checkpoint_directory(run_dir, 4) / FILES[4]).unlink()
    with pytest.raises(CheckpointError, match="it is missing"):
        superseded(run_dir, checkpoint_directory(run_dir, 4), 1, None)


def test_a_killed_deletion_leaves_no_incomplete_checkpoint(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        (path / FILES[4]).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(checkpoint_directory(run_dir, 2))
    monkeypatch.undo()
    assert not checkpoint_directory(run_dir, 2).exists()
    (leftover,) = remove_leftovers(run_dir)
    assert leftover.startswith("step_00000002.deleting-")
    assert names(list((run_dir / "checkpoints").iterdir())) == ["step_00000004"]


def test_a_deletion_is_on_disk_before_files_go(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    delete_checkpoint(checkpoint_directory(run_dir, 2))
    assert synced == [str(run_dir / "checkpoints")]


def test_only_leftovers_of_killed_saves_are_removed(run_dir: Path) -> None:
    for name in ("step_00000006.writing-0a1b2c3d", "step_00000006.mine", "notes"):
        (run_dir / "checkpoints" / name).mkdir()
    assert remove_leftovers(run_dir) == ["step_00000006.writing-0a1b2c3d"]
    kept = names(sorted((run_dir / "checkpoints").iterdir()))
    assert kept == ["notes", "step_00000002", "step_00000004", "step_00000006.mine"]


def test_a_leftover_that_cannot_be_deleted_is_a_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("step_00000006.writing-0a1b2c3d", "step_00000008.writing-4e5f6a7b"):
        (run_dir / "checkpoints" / name).mkdir()
    remove_tree = shutil.rmtree

    def busy(path: Path) -> None:
        if "step_00000006" in path.name:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        remove_tree(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert remove_leftovers(run_dir) == ["step_00000008.writing-4e5f6a7b"]
    (warning,) = caplog.messages
    assert warning.startswith("a leftover of a killed save could not be deleted: [Errno 39] Directory not empty: '/")


def test_directories_of_a_new_checkpoint_are_on_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = checkpoint_directory(run_dir, 6)
    temporary = final.with_name("step_00000006.writing-0a1b2c3d")
    shutil.copytree(checkpoint_directory(run_dir, 4), temporary)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    publish_checkpoint(temporary, final)
    assert synced == [str(run_dir / "checkpoints"), str(run_dir)]


def test_a_new_save_of_a_step_replaces_a_damaged_one(run_dir: Path) -> None:
    final = checkpoint_directory(run_dir, 4)
    temporary = final.with_name("step_00000004.writing-0a1b2c3d")
    shutil.copytree(final, temporary)
    flip(final / FILES[4], 3)
    publish_checkpoint(temporary, final)
    assert choose_checkpoint(run_dir).checkpoint == final
    assert names(sorted(final.parent.iterdir())) == ["step_00000002", "step_00000004"]


# The real thing.


def test_every_file_of_a_saved_checkpoint_is_in_its_manifest(one_rank_runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "whole"
    shutil.copytree(one_rank_runs / "whole", copy)
    newest = checkpoint_directory(copy, 8)
    manifest = CheckpointManifest.read(newest)
    assert set(manifest.files) == {
        path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()
    } - {"manifest.json"}
    assert manifest.layout == {"world_size": 1, "tensor": 1, "pipeline": 1, "context": 1, "data": 1}
    assert manifest.versions["megatron-core"]
    for name in manifest.files:
        middle = manifest.files[name].bytes // 2
        flip(newest / name, middle)
        choice = choose_checkpoint(copy)
        assert choice.checkpoint == checkpoint_directory(copy, 4)
        assert choice.refused == (f"{newest / name}: {CHANGED}",)
        flip(newest / name, middle)
    assert choose_checkpoint(copy).checkpoint == newest
