"""A run goes on with another setting only where it is named, and never with one that its checkpoints contradict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.keys import all_keys, location_of, section_at
from nemo_prolong.config.rules import check
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import CheckpointError, ConfigError, DataError
from nemo_prolong.records.checkpoint.manifest import checkpoint_directory
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.run_directory import CONFIG_FILE, RunDirectory
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, SettingChange, StageManifest
from nemo_prolong.stages.differences import check_changeable, with_defaults
from nemo_prolong.stages.manifest import continued, new_manifest
from nemo_prolong.stages.preflight import Start, check_files, dump

DATA = DataManifestFile("", None)
"""The rows of these tests have no manifest."""


def start_of(cfg: RunConfig, rank: int = 0) -> Start:
    """Look at what is on disk, as the start of a stage does."""
    return check_files(cfg, RunDirectory(cfg.run_dir), rank)


def refusal(kind, cfg) -> str:
    with pytest.raises(kind) as error:
        start_of(cfg)
    assert type(error.value) is kind
    return str(error.value)


def stored(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / CONFIG_FILE).read_text())


# Named settings.


@pytest.mark.parametrize("name", ["optim.lr", "optim"])
def test_a_named_key_may_differ_and_is_returned(name, make_config, make_run):
    run_dir = make_run(make_config(), "running", (2,))
    start = start_of(make_config(optim={"lr": 0.02}, resume={"allow": [name]}))
    assert start.resume == checkpoint_directory(run_dir, 2)
    assert start.changes == (SettingChange(step=2, key="optim.lr", before=0.01, after=0.02),)
    assert str(start.changes[0]) == "optim.lr (0.01 -> 0.02)"


def test_what_is_not_named_is_refused_with_what_would_allow_it(make_config, make_run):
    make_run(make_config(), "running", (2,))
    changed = make_config(
        optim={"lr": 0.02, "weight_decay": 0.0}, model={"rotary_base": 20000.0}, resume={"allow": ["optim.l", "model"]}
    )
    assert refusal(CheckpointError, changed) == (
        f"name=tiny: {changed.run_dir} holds another run; it differs in optim.lr (0.01 -> 0.02), "
        "optim.weight_decay (0.1 -> 0.0). Repeat that run's command to continue it, or give the run another name=..., "
        "or remove the directory, or continue it with the new values: 'resume.allow=[optim.lr,optim.weight_decay]'."
    )


def test_a_key_that_is_named_and_the_same_changes_nothing(make_config, make_run):
    make_run(make_config(), "running", (2,))
    assert start_of(make_config(resume={"allow": ["optim.lr", "seed"]})).changes == ()


ORDER = "it decides which rows come at which step, and rows were trained on already"
TENSORS = "the tensors of the checkpoints have the shapes and formats that it decides"


@pytest.mark.parametrize(
    ("changes", "change", "reason"),
    [
        ({"seed": 7}, "seed (42 -> 7)", ORDER),
        ({"seq_length": 128}, "seq_length (64 -> 128)", ORDER),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size (4 -> 8)", ORDER),
        ({"model": {"num_layers": 3}}, "model.num_layers (2 -> 3)", TENSORS),
        ({"precision": {"compute": "bf16"}}, "precision.compute (fp32 -> bf16)", TENSORS),
        ({"stage": "stage1"}, "stage (base -> stage1)", "it says which run this is"),
    ],
)
def test_contradictions_of_the_checkpoint_cannot_be_named(changes, change, reason, make_config, make_run):
    key = change.split()[0]
    run_dir = make_run(make_config(), "running", (2,))
    cfg = make_config(**changes, resume={"allow": [key]})
    assert refusal(ConfigError, cfg) == (
        f"resume.allow=[{key}]: {change} cannot be allowed: {reason}. "
        "Keep the old value, or start a new stage from a complete run with parent=...."
    )
    # Without a checkpoint the run starts over, and nothing was trained with the old value.
    shutil.rmtree(run_dir / "checkpoints")
    assert start_of(cfg).changes[0].key == key


def test_model_keys_are_fixed_unless_no_tensor_needs_them() -> None:
    free = {"name", "license", "rotary_base", "rope_scaling", "layernorm_epsilon", "init_method_std"}
    model = section_at(RunConfig, location_of("model"))
    assert model is not None
    for name in model.model_fields:
        change = SettingChange(step=2, key=f"model.{name}", before=1, after=2)
        if name in free:
            check_changeable([change])
        else:
            with pytest.raises(ConfigError):
                check_changeable([change])


def test_other_data_is_refused_once_rows_were_trained_on(make_config, make_run, data_root):
    run_dir = make_run(make_config(), "running", (2,))
    (data_root / "manifest.json").write_text('{"seed": 1}')
    named = make_config(resume={"allow": ["data.root", "data"]})
    assert "is not the data that" in refusal(DataError, named)
    shutil.rmtree(run_dir / "checkpoints")
    assert "is not the data that" in refusal(DataError, make_config())
    assert start_of(named).resume is None


def test_data_that_moved_is_the_same_data_when_its_manifest_is(make_config, make_run, data_root):
    (data_root / "manifest.json").write_text("{}")
    run_dir = make_run(make_config(), "running", (2,))
    moved = data_root.rename(data_root.with_name("moved"))
    cfg = make_config(data={"root": str(moved)}, resume={"allow": ["data.root"]})
    assert start_of(cfg).resume == checkpoint_directory(run_dir, 2)


def test_fewer_steps_than_were_trained_are_refused(make_config, make_run):
    make_run(make_config(train={"train_iters": 8}), "running", (6,))
    cfg = make_config(train={"train_iters": 4}, resume={"allow": ["train.train_iters"]})
    assert refusal(ConfigError, cfg) == (
        "train.train_iters=4: 6 steps have been trained already. Set train.train_iters=6 or more."
    )


def test_a_complete_run_is_not_extended(make_config, make_run):
    make_run(make_config(), "complete", (4,))
    cfg = make_config(train={"train_iters": 8}, resume={"allow": ["train.train_iters"]})
    assert "already holds a complete run of base" in refusal(CheckpointError, cfg)


def test_a_name_that_is_no_key_is_refused_with_the_nearest(make_config):
    with pytest.raises(ConfigError) as error:
        check(make_config(resume={"allow": ["optim.lrr", "optim", "xyz"]}))
    assert str(error.value).splitlines() == [
        "resume.allow=[optim.lrr]: no such key in the configuration. Did you mean optim.lr?",
        "resume.allow=[xyz]: no such key in the configuration. Name keys as they are typed, such as optim.lr.",
    ]


def test_the_manifest_keeps_start_parent_and_changes_once(make_config):
    change = SettingChange(step=2, key="optim.lr", before=0.01, after=0.02)
    before = new_manifest(make_config(), None, None, "first", 1, DATA).model_copy(
        update={"started_at": "2026-01-01T00:00:00Z"}
    )
    once = continued(new_manifest(make_config(), before, None, "second", 2, DATA), before, 2, [change])
    assert (once.started_at, once.step, once.changes) == (before.started_at, 2, [change])
    assert continued(once, once, 2, [change]).changes == [change]


def test_overlaps_and_recomputation_may_differ_without_a_word(make_config, make_run):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    run_dir = make_run(make_config(precision={"recompute": full}), "running", (2,))
    overlaps = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    for recompute in ({}, {"recompute_granularity": "auto"}):
        start = start_of(make_config(precision={"recompute": recompute}, parallelism=overlaps))
        assert (start.resume, start.changes) == (checkpoint_directory(run_dir, 2), ())
    fused = make_config(precision={"recompute": full, "gradient_accumulation_fusion": True})
    assert "precision.gradient_accumulation_fusion (None -> True)" in refusal(CheckpointError, fused)


# Configurations of earlier versions.


def test_a_run_without_newer_keys_goes_on_with_defaults(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2,))
    config = stored(run_dir)
    for key in ("faults", "resume", "tracker", "cluster"):
        del config[key]
    del config["precision"]["offload"], config["precision"]["recompute"]["recompute_modules"]
    del config["model"]["rope_scaling"], config["train"]["loss_average"]
    (run_dir / CONFIG_FILE).write_text(json.dumps(config))
    assert start_of(cfg).resume == checkpoint_directory(run_dir, 2)
    changed = make_config(train={"loss_average": "per_device"}, faults={"spike_sigmas": 3.0})
    assert "faults.spike_sigmas (6.0 -> 3.0), train.loss_average (global -> per_device)." in refusal(
        CheckpointError, changed
    )


def test_a_stored_key_that_is_gone_counts_as_a_difference(make_config, make_run):
    run_dir = make_run(make_config(), "running", (2,))
    config = stored(run_dir)
    config["optim"]["momentum"] = 0.5
    (run_dir / CONFIG_FILE).write_text(json.dumps(config))
    assert "it differs in optim.momentum (0.5 -> None)." in refusal(CheckpointError, make_config())


def test_every_key_with_a_default_is_filled_in_at_every_depth(make_config):
    complete = dump(make_config())
    required = RunConfig(**complete).model_dump(mode="json", exclude_defaults=True)
    filled = with_defaults(required, RunConfig)
    # A section without one required key is a default as a whole.
    assert filled == complete
    assert len(list(all_keys(RunConfig))) > 80


# A start that was killed half-way.


@pytest.mark.parametrize("left", [(), (MANIFEST_FILE,), (MANIFEST_FILE, "overrides.txt")])
def test_a_start_killed_between_files_is_started_over(left, make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (4,))
    child = make_child(parent)
    fresh = start_of(child)
    run_dir = make_run(child, "running", ())
    (run_dir / "overrides.txt").touch()
    for path in run_dir.iterdir():
        if path.name not in left:
            path.unlink()
    (run_dir / ".stage.json.123.tmp").write_text("{")
    assert start_of(child).parent_checkpoint == checkpoint_directory(parent, 4)
    assert start_of(child).parent_record == fresh.parent_record


def test_a_stage_killed_early_takes_the_same_from_its_parent_again(make_config, make_child, make_run):
    parent = make_run(make_config(name="parent"), "complete", (4,))
    child = make_child(parent)
    fresh = start_of(child)
    run_dir = make_run(child, "running", (), fresh.parent_record)
    (run_dir / "checkpoints" / "step_00000002.writing-0a1b2c3d").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    again = start_of(child)
    assert isinstance(again, Start) and again.run is None and again.resume is None
    assert (again.parent_checkpoint, again.parent_record) == (fresh.parent_checkpoint, fresh.parent_record)
    assert StageManifest.read(run_dir).parent is not None
