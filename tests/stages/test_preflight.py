"""What is wrong on disk is refused before training starts, and an interrupted run is found again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, ParentRecord, StageManifest
from nemo_prolong.stages.preflight import Start
from nemo_prolong.stages.run import run_stage
from tests.support.preflight import refusal, start_of
from tests.support.stored_rows import write_data as write_named_rows

DATA = DataManifestFile("", None)
"""The rows of these tests have no manifest."""


NEW_NAME = "Give the run another name=..., or remove the directory."
CONTINUE = "Repeat that run's command to continue it, or give the run another name=..., or remove the directory."


def listing(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


# Data.


def test_missing_data_is_refused_with_the_command_that_writes_it(make_config, tmp_path):
    missing = tmp_path / "nowhere"
    assert refusal(DataError, make_config(data={"root": str(missing)})) == (
        f"data.root={missing}: the data directory does not exist. "
        f"Write it with: python scripts/prepare_data.py +exp=data/NAME output={missing}"
    )


def test_a_tree_of_row_sets_below_one_path_is_accepted(make_config, data_root):
    (data_root / "tree").mkdir()
    (data_root / "rows").rename(data_root / "tree" / "part")
    assert start_of(make_config(data={"mixture": [{"path": "tree", "proportion": 1.0}]})) == Start(DATA)


def test_a_data_directory_is_no_row_set_of_a_mixture(make_config, data_root):
    write_named_rows(data_root / "inner")
    message = refusal(DataError, make_config(data={"mixture": [{"path": "inner", "proportion": 1.0}]}))
    assert message.startswith("data.mixture path=inner: is a data directory; its row sets are docs-19, deep/chat-11.")


def test_a_row_set_without_an_index_is_refused_by_name(make_config, data_root):
    (data_root / "rows" / "index.json").unlink()
    assert refusal(DataError, make_config()) == (
        f"data.mixture path=rows: {data_root}/rows holds no packed rows. "
        f"Write it with: python scripts/prepare_data.py +exp=data/NAME output={data_root}"
    )


def test_a_row_set_of_the_validation_is_looked_for_too(make_config, data_root):
    message = refusal(DataError, make_config(data={"validation": ["rows", "held-out"]}))
    assert message.startswith(f"data.validation=held-out: {data_root}/held-out holds no packed rows.")


def test_a_row_set_without_a_target_is_refused_where_masks_apply(make_config, data_root):
    manifest = data_root / "manifest.json"
    manifest.write_text(json.dumps({"row_sets": {"rows": {"target_tokens": 0}}}))
    rule = (
        f"=rows: no token of its rows is a target, as {manifest} says, so data.apply_instruct_masks=true leaves "
        "nothing to learn. Prepare it again with longer rows or shorter conversations, or leave it out."
    )
    masked = make_config(data={"apply_instruct_masks": True})
    assert refusal(DataError, masked) == f"data.mixture path{rule}"
    assert start_of(make_config()).data.target_tokens("rows") == 0


@pytest.mark.parametrize("row_sets", [{}, {"rows": {}}, {"rows": {"target_tokens": None}}, {"rows": 3}, [], None])
def test_row_sets_whose_targets_nobody_counted_are_trained_on(make_config, data_root, row_sets):
    (data_root / "manifest.json").write_text(json.dumps({"row_sets": row_sets}))
    assert start_of(make_config(data={"apply_instruct_masks": True})).data.target_tokens("rows") is None


# Parent.


def test_a_parent_that_does_not_exist_is_refused(make_child, tmp_path):
    assert refusal(CheckpointError, make_child(tmp_path / "nowhere")) == (
        f"parent={tmp_path}/nowhere: the parent run does not exist. Train the parent stage first, or name its run."
    )


def test_a_hugging_face_parent_that_does_not_exist_is_refused(make_child):
    assert refusal(CheckpointError, make_child("hf:models/llama")) == (
        "parent=hf:models/llama: the directory does not exist. Download the model, or correct the path."
    )


def test_a_parent_that_is_no_run_is_refused(make_child, data_root):
    assert refusal(CheckpointError, make_child(data_root)) == (
        f"{data_root}: a run directory has a stage.json; this one has none. "
        "Name the directory of a run of scripts/train.py, such as runs/stage1."
    )


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_an_unfinished_parent_is_refused_with_its_command(status, make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), status, (2,))
    assert refusal(CheckpointError, make_child(parent)) == (
        f"parent={parent}: the parent is not complete (step 2 of 4, status {status}). "
        "Finish it by repeating its command: python scripts/train.py +exp=tiny"
    )


def test_a_complete_parent_without_checkpoints_is_refused(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", ())
    assert refusal(CheckpointError, make_child(parent)) == (
        f"parent={parent}: the parent is complete, but its checkpoints are gone. "
        "Restore them, or train the parent again under another name."
    )


def test_a_parent_of_another_shape_is_refused(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (4,))
    child = make_child(parent, model={"name": "wide", "num_layers": 3, "ffn_hidden_size": 256})
    assert refusal(ConfigError, child) == (
        f"parent={parent}: the model differs from the parent's in model.ffn_hidden_size (128 -> 256), "
        "model.num_layers (2 -> 3). Use the parent's model, tiny-llama."
    )


def test_a_larger_vocabulary_than_a_parent_runs_is_refused(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (4,))
    assert refusal(ConfigError, make_child(parent, model={"vocab_size": 513})) == (
        f"model.vocab_size=513: the vocabulary of the parent {parent} has 512 tokens. Set model.vocab_size=512. "
        f"A run's vocabulary is fixed, so export the parent (scripts/export.py run={parent} output=DIR) and start with "
        "parent=hf:DIR transition=weights."
    )


def test_a_complete_parent_gives_its_newest_checkpoint(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (2, 4))
    start = start_of(make_child(parent))
    assert start.resume is None
    assert start.parent is not None and start.parent.name == "parent"
    assert start.parent_record == ParentRecord(
        path=str(parent), step=4, transition="weights", rotary_base=10000.0, working_directory=os.getcwd()
    )
    assert start.parent_checkpoint == checkpoint_directory(parent, 4)


def test_a_new_rope_base_and_a_new_name_are_no_other_shape(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (4,))
    child = make_child(parent, model={"rotary_base": 80000.0, "name": "tiny-long", "init_method_std": 0.01})
    assert start_of(child).parent_checkpoint == checkpoint_directory(parent, 4)


# Run directory.


def test_a_new_run_starts_from_nothing(make_config, tmp_path):
    before = listing(tmp_path)
    assert start_of(make_config()) == Start(DATA)
    assert listing(tmp_path) == before


def test_a_directory_that_is_not_a_run_is_left_as_it_is(make_config):
    cfg = make_config()
    notes = Path(cfg.run_dir) / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert refusal(CheckpointError, cfg) == (
        f"name=tiny: {cfg.run_dir} exists and is not the directory of a run. {NEW_NAME}"
    )
    assert listing(notes.parent) == [notes] and notes.read_text() == "mine"


def test_a_file_in_the_place_of_the_run_directory_is_refused(make_config):
    cfg = make_config()
    Path(cfg.run_dir).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.run_dir).write_text("mine")
    assert refusal(CheckpointError, cfg) == (
        f"name=tiny: {cfg.run_dir} is a file. Give the run another name=..., or remove the file."
    )


def test_a_run_without_its_configuration_is_not_continued(make_config, make_run):
    run_dir = make_run(make_config(), "running", (2,))
    (run_dir / "config.json").unlink()
    assert refusal(CheckpointError, make_config()).startswith(
        f"name=tiny: {run_dir} exists and is not the directory of a run."
    )


def test_a_complete_run_is_never_trained_over(make_config, make_run):
    cfg = make_config()
    make_run(cfg, "complete", (4,))
    assert refusal(CheckpointError, cfg) == (
        f"name=tiny: {cfg.run_dir} already holds a complete run of base. {NEW_NAME}"
    )


DONE = {"resume": {"when_complete": "succeed"}}


def test_a_complete_run_is_nothing_to_do_where_that_is_a_success(make_config, make_run):
    make_run(make_config(), "complete", (2, 4))
    cfg = make_config(**DONE)
    start = start_of(cfg)
    assert (start.complete, start.resume) == (True, None)
    assert not start_of(cfg, rank=1).complete


def test_a_complete_run_of_other_settings_is_no_success(make_config, make_run):
    make_run(make_config(), "complete", (4,))
    message = refusal(CheckpointError, make_config(seed=7, **DONE))
    assert "holds another run; it differs in seed (42 -> 7). Repeat that run's command" in message


def test_a_complete_run_with_a_damaged_end_is_trained_to_its_end(make_config, make_run):
    run_dir = make_run(make_config(), "complete", (2, 4))
    damage(run_dir / "checkpoints" / "step_00000004")
    cfg = make_config(**DONE)
    start = start_of(cfg)
    assert not start.complete and start.resume.name == "step_00000002"


def test_a_stage_that_is_complete_says_so_and_ends(make_config, make_run, caplog):
    make_run(make_config(), "complete", (4,))
    cfg = make_config(**DONE)
    before = StageManifest.read(Path(cfg.run_dir))
    with caplog.at_level(logging.INFO):
        run_stage(cfg, [])
    assert caplog.messages == [f"{cfg.run_dir} is complete already: 4 of 4 steps"]
    assert StageManifest.read(Path(cfg.run_dir)) == before


def test_another_configuration_is_refused_with_both_values(make_config, make_run):
    make_run(make_config(), "running", (2,))
    cfg = make_config(seed=7, optim={"lr": 0.02})
    assert refusal(CheckpointError, cfg) == (
        f"name=tiny: {cfg.run_dir} holds another run; it differs in optim.lr (0.01 -> 0.02), seed (42 -> 7). {CONTINUE}"
    )


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"train": {"train_iters": 8}}, "train.train_iters (4 -> 8)"),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size (4 -> 8)"),
        ({"model": {"rotary_base": 80000.0}}, "model.rotary_base (10000.0 -> 80000.0)"),
        ({"seq_length": 128}, "seq_length (64 -> 128)"),
        (
            {"data": {"mixture": [{"path": "rows", "proportion": 0.5}]}},
            "data.mixture ([{'path': 'rows', 'proportion': 1.0}] -> [{'path': 'rows', 'proportion': 0.5}])",
        ),
    ],
)
def test_every_section_that_decides_what_is_trained_counts(changes, difference, make_config, make_run):
    make_run(make_config(), "stopped", (2,))
    assert f"it differs in {difference}. " in refusal(CheckpointError, make_config(**changes))


def test_a_run_is_not_continued_on_other_data(make_config, make_run, data_root):
    (data_root / "manifest.json").write_text("{}")
    run_dir = make_run(make_config(), "running", (2,))
    (data_root / "manifest.json").write_text('{"seed": 1}')
    before, now = (hashlib.sha256(text).hexdigest() for text in (b"{}", b'{"seed": 1}'))
    assert refusal(DataError, make_config()) == (
        f"data.root={data_root}: is not the data that {run_dir} was trained on: "
        f"its manifest.json has the SHA-256 {now}, not {before}. "
        "Put the data back, or start a new run with another name=...."
    )


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_the_same_configuration_resumes_from_the_highest_step(status, make_config, make_run):
    cfg = make_config(train={"train_iters": 12})
    # Neither the order of writing nor the number of digits decides.
    run_dir = make_run(cfg, status, (2, 10, 3))
    start, checkpoint = start_of(cfg), checkpoint_directory(run_dir, 10)
    assert start == Start(DATA, resume=checkpoint, run=StageManifest.read(run_dir), verified=start.verified)
    (verified,) = start.verified
    assert verified.startswith(f"verified {checkpoint}: 7 files, 4.4 KiB in ")


def test_a_checkpoint_that_was_being_written_is_ignored(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2,))
    (run_dir / "checkpoints" / "step_00000003.writing-0a1b2c3d").mkdir()
    assert start_of(cfg).resume == checkpoint_directory(run_dir, 2)


def test_a_run_stopped_before_its_first_checkpoint_restarts(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", ())
    (run_dir / "checkpoints" / "step_00000002.writing-0a1b2c3d").mkdir(parents=True)
    assert start_of(cfg) == Start(DATA)


def test_another_layout_or_tracker_continues_the_same_run(make_config, make_run):
    run_dir = make_run(make_config(), "running", (2,))
    changed = make_config(
        parallelism={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        tracker={"tensorboard": True},
        checkpoint={"save_interval_steps": 1},
        data={"num_workers": 2},
        train={"log_every_n_steps": 2},
    )
    assert start_of(changed).resume == checkpoint_directory(run_dir, 2)


def damage(checkpoint: Path) -> Path:
    """Flip one bit of a shard and return it."""
    shard = checkpoint / "weights" / "__0_1.distcp"
    content = bytearray(shard.read_bytes())
    content[100] ^= 4
    shard.write_bytes(content)
    return shard


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2, 4))
    shard = damage(checkpoint_directory(run_dir, 4))
    start = start_of(cfg)
    assert start.resume == checkpoint_directory(run_dir, 2)
    assert start.refused == (f"{shard}: its SHA-256 is not that of the manifest: it was changed or damaged.",)


def test_a_complete_run_with_a_damaged_end_continues_before_it(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "complete", (2, 4))
    assert "complete run" in refusal(CheckpointError, cfg)
    damage(checkpoint_directory(run_dir, 4))
    assert start_of(cfg).resume == checkpoint_directory(run_dir, 2)


def test_a_run_with_no_good_checkpoint_loses_nothing(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2, 4))
    shards = [damage(checkpoint_directory(run_dir, step)) for step in (2, 4)]
    assert refusal(CheckpointError, cfg) == (
        f"{run_dir / 'checkpoints'}: none of its 2 checkpoints is good. {shards[1]}: its SHA-256 is not that of the "
        "manifest: it was changed or damaged. Restore one from a backup, or start again under another name=...."
    )
    assert all(shard.is_file() for shard in shards)


def test_a_parent_with_a_damaged_checkpoint_is_refused_with_the_repair(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (2, 4))
    shard = damage(checkpoint_directory(parent, 4))
    assert refusal(CheckpointError, make_child(parent)) == (
        f"parent={parent}: the parent's last checkpoint cannot be used: {shard}: its SHA-256 is not that of the "
        "manifest: it was changed or damaged. Restore it, or repeat the parent's command, which continues from its "
        "newest good one: python scripts/train.py +exp=tiny"
    )


def test_a_child_that_goes_on_does_not_need_its_parent(make_child, make_run):
    record = ParentRecord(path="runs/gone", step=4, transition="weights", sha256="1" * 64, context_length=8192)
    child = make_child("runs/gone")
    run_dir = make_run(child, "running", (1,), record)
    for rank in (0, 1):
        start = start_of(child, rank)
        assert start.resume == (None if rank else checkpoint_directory(run_dir, 1))
    kept = start_of(child).parent_record
    assert kept is not None and kept == StageManifest.read(run_dir).parent
    assert (kept.path, kept.step, kept.sha256, kept.context_length) == ("runs/gone", 4, "1" * 64, 8192)


# Ranks.


def test_logs_of_other_ranks_do_not_make_a_directory_taken(make_config):
    cfg = make_config()
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True)
    (run_dir / "train.rank1.log").touch()
    (run_dir / "train.rank13.log").touch()
    assert start_of(cfg) == Start(DATA)
    # The log of rank 0 is one of an earlier run.
    (run_dir / "train.log").touch()
    assert "is not the directory of a run." in refusal(CheckpointError, cfg)


def test_only_rank_0_judges_the_run_directory(make_config, make_run):
    run_dir = make_run(make_config(), "complete", (2,))
    other = make_config(seed=7)
    assert "complete run" in refusal(CheckpointError, other)
    assert start_of(other, rank=1) == Start(DATA)
    (run_dir / MANIFEST_FILE).unlink()
    assert "is not the directory of a run." in refusal(CheckpointError, other)
    assert start_of(other, rank=1) == Start(DATA)


def test_every_rank_judges_data_and_parent(make_config, make_child, tmp_path):
    assert "does not exist" in refusal(DataError, make_config(data={"root": str(tmp_path / "nowhere")}), rank=1)
    assert "does not exist" in refusal(CheckpointError, make_child(tmp_path / "nowhere"), rank=1)


def test_a_manifest_that_is_not_json_is_refused_by_path(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2,))
    (run_dir / MANIFEST_FILE).write_text("{")
    assert refusal(CheckpointError, cfg).startswith(
        f"{run_dir}/stage.json: it is not a stage manifest of this version ("
    )
