"""Data, tokenizer, run directory, parent and disks are judged as the start of a stage judges them, by samples."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nemo_prolong.doctor.checks.stage import (
    cache_finding,
    data_findings,
    disk_finding,
    disk_findings,
    found_by,
    stage_probes,
    start_findings,
)
from nemo_prolong.doctor.facts import Volume
from nemo_prolong.doctor.finding import Level
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.names import pieces
from tests.support.fake_checkpoint import write_checkpoint
from tests.support.recorded_node import GIB, said, stage


def write_hf_directory(directory, model):
    """Write a Hugging Face directory of the model, all zeros, without torch."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": model.hidden_size, "intermediate_size": model.ffn_hidden_size, "head_dim": model.kv_channels,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups, "vocab_size": model.vocab_size, "rope_theta": 10000.0,
        "rms_norm_eps": model.layernorm_epsilon, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    named = [(name, shape) for piece in pieces(model) for name, shape in zip(piece.names, piece.shapes, strict=True)]
    save_file({name: np.zeros(shape, np.float32) for name, shape in named}, directory / "model.safetensors")


def words(findings):
    return [(finding.name, finding.level, finding.what) for finding in findings]


def room(free_bytes, **changes):
    return replace(Volume("/scratch/runs", 10_000 * GIB, free_bytes, "xfs"), **changes)


def test_data_and_tokenizer_that_are_whole(make_config, data_root):
    assert words(data_findings(make_config())) == [
        ("data", Level.OK, f"{data_root}: 1 row set, sizes of 1 shard and hashes of 1 as they should be."),
        ("tokenizer", Level.OK, f"{data_root}/tokenizer is there, and the rows do not name theirs."),
    ]


def test_missing_data_is_refused_in_the_words_of_the_stage(make_config, tmp_path):
    (finding,) = data_findings(make_config(data={"root": str(tmp_path / "nowhere")}))
    assert (finding.name, finding.level) == ("data", Level.NO_GO)
    assert said(finding) == (
        f"data.root={tmp_path}/nowhere: the data directory does not exist.\n"
        "scripts/train.py ends with the same words.\n"
        f"Write it with: python scripts/prepare_data.py +exp=data/NAME output={tmp_path}/nowhere"
    )


def test_a_shard_of_another_size_is_named(make_config, data_root):
    shard = next((data_root / "rows").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (finding,) = data_findings(make_config())
    assert finding.level is Level.NO_GO
    assert finding.what.startswith(f"{shard}: has {shard.stat().st_size} bytes, the index says ")


def test_a_shard_that_was_changed_is_found_by_the_hash_of_the_manifest(make_config, data_root):
    shard = next((data_root / "rows").glob("shard*"))
    facts = {"rows": {"shards": {shard.name: {"bytes": 1, "sha256": "0" * 64}}}}
    (data_root / "manifest.json").write_text(json.dumps({"row_sets": facts}))
    (finding,) = data_findings(make_config(), random.Random(0))
    assert finding.what.startswith(f"{shard}: has the SHA-256 ")
    assert finding.what.endswith(f", the manifest says {'0' * 64}.")
    assert finding.remedy == "The shard was changed or damaged: copy or prepare it again."


def test_a_shard_that_was_changed_is_found_by_the_hash_of_its_index(make_config, data_root):
    shard = next((data_root / "rows").glob("shard*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    (finding,) = data_findings(make_config())
    assert finding.what.startswith(f"{shard}: has the SHA-256 ")
    assert ", its index says " in finding.what


def test_a_tokenizer_that_the_model_is_too_small_for(make_config):
    *_, finding = data_findings(make_config(model={"vocab_size": 256}))
    assert (finding.name, finding.level) == ("tokenizer", Level.NO_GO)
    assert "Set model.vocab_size=512." in finding.remedy


def test_a_stage_that_begins_and_one_that_goes_on(make_config, make_run):
    cfg = make_config()
    assert words(start_findings(cfg)) == [
        ("run_directory", Level.OK, f"{cfg.run_dir}: the stage begins there."),
        ("parent", Level.OK, "the stage starts from nothing."),
    ]
    make_run(cfg, "running", (2,))
    assert words(start_findings(cfg)) == [("run_directory", Level.OK, f"{cfg.run_dir}: the run goes on after step 2.")]


def test_a_newer_checkpoint_that_is_damaged_costs_its_steps(make_config, make_run):
    cfg = make_config()
    run_dir = make_run(cfg, "running", (2, 3))
    (run_dir / "checkpoints/step_00000003/weights/__0_0.distcp").unlink()
    going, passed_over = start_findings(cfg)
    assert going.what == f"{cfg.run_dir}: the run goes on after step 2."
    assert passed_over.level is Level.WARNING
    assert passed_over.what.startswith(
        f"a checkpoint is not used: {run_dir}/checkpoints/step_00000003/weights/__0_0.distcp"
    )


def test_a_run_directory_of_another_run(make_config, make_run):
    make_run(make_config(seed=7), "running", (2,))
    (finding,) = start_findings(make_config())
    assert (finding.name, finding.level) == ("run_directory", Level.NO_GO)
    assert "holds another run; it differs in seed" in finding.what


def test_a_parent_that_is_complete(make_config, make_run, make_child):
    parent = make_run(make_config(), "complete", (4,))
    assert words(start_findings(make_child(parent)))[1] == (
        "parent",
        Level.OK,
        f"{parent} is complete, its checkpoint of step 4 has its files, sizes and sampled hashes.",
    )


@pytest.mark.parametrize(
    ("status", "steps", "rule"),
    [
        ("running", (2,), "the parent is not complete (step 2 of 4, status running)."),
        ("complete", (), "the parent is complete, but its checkpoints are gone."),
    ],
)
def test_a_parent_that_is_not_whole(make_config, make_run, make_child, status, steps, rule):
    parent = make_run(make_config(), status, steps)
    *_, finding = start_findings(make_child(parent))
    assert (finding.name, finding.level, finding.what) == ("parent", Level.NO_GO, f"parent={parent}: {rule}")


def test_a_damaged_checkpoint_of_the_parent_is_found_by_its_hash(make_config, make_run, make_child):
    parent = make_run(make_config(), "complete", (4,))
    shard = parent / "checkpoints/step_00000004/weights/__1_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    *_, finding = start_findings(make_child(parent))
    assert finding.level is Level.NO_GO
    assert f"{shard}: its SHA-256 is not that of the manifest" in finding.what


def test_what_is_too_large_for_a_sample_is_compared_by_size(make_config, make_run, make_child, monkeypatch):
    parent = make_run(make_config(), "complete", (4,))
    shard = parent / "checkpoints/step_00000004/weights/__1_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    monkeypatch.setattr("nemo_prolong.records.checkpoint.verify._SAMPLE_BYTES", 1000)
    assert start_findings(make_child(parent))[1].level is Level.OK


def test_a_parent_that_does_not_exist(make_child, tmp_path):
    *_, finding = start_findings(make_child(tmp_path / "gone"))
    assert said(finding) == (
        f"parent={tmp_path}/gone: the parent run does not exist.\n"
        "scripts/train.py ends with the same words.\n"
        "Train the parent stage first, or name its run."
    )


def test_a_hugging_face_directory_as_parent_is_judged_without_hashing_it(make_child, tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceDirectory, "sha256", lambda directory: pytest.fail("all of it is read"))
    cfg = make_child(f"hf:{tmp_path}/model")
    write_hf_directory(tmp_path / "model", cfg.model)
    assert words(start_findings(cfg))[1] == (
        "parent",
        Level.OK,
        f"hf:{tmp_path}/model holds every tensor of {cfg.model.name} in its shape.",
    )
    (tmp_path / "model" / "model.safetensors").unlink()
    *_, finding = start_findings(cfg)
    assert (finding.level, finding.remedy) == (Level.NO_GO, "Download all of the model.")


def test_checkpoints_that_find_room():
    finding = disk_finding(stage("stage2"), room(400 * GIB), 0)
    assert (finding.level, finding.what) == (
        Level.OK,
        "runs/stage2 has 400.0 GiB free, and its checkpoints take 314.1 GiB more.",
    )


def test_checkpoints_that_find_no_room():
    finding = disk_finding(stage("stage2"), room(200 * GIB), 0)
    assert finding.level is Level.NO_GO
    assert said(finding) == (
        "runs/stage2 has 200.0 GiB free, and 314.1 GiB more are needed: 3 checkpoints of 104.7 GiB, the one being "
        "written among them.\n"
        "Saves fail on a full disk, and training stops after 3 of them.\n"
        "Free some space, name a larger file system with runs_dir=DIR, or keep fewer (checkpoint.keep_last)."
    )


def test_checkpoints_that_are_there_need_no_room_again():
    assert disk_finding(stage("stage2"), room(200 * GIB), 210 * GIB).level is Level.OK


def test_a_run_directory_that_may_not_be_written():
    finding = disk_finding(stage("stage2"), room(400 * GIB, writable=False), 0)
    assert (finding.level, finding.what) == (Level.NO_GO, "runs/stage2 cannot be written to.")


def test_the_disk_of_a_stage_is_looked_at(make_config):
    write_checkpoint(Path(make_config().run_dir), 2)
    (finding,) = disk_findings(make_config())
    assert finding.level is Level.OK
    assert finding.what.startswith(f"{make_config().run_dir} has ")


@pytest.mark.parametrize(
    ("volume", "level", "what"),
    [
        (room(100 * GIB), Level.OK, "the shard cache /scratch/runs has 100.0 GiB free for 80.0 GiB."),
        (
            room(50 * GIB),
            Level.NO_GO,
            "the shard cache /scratch/runs has 50.0 GiB free, and the shards of the stage take 80.0 GiB more.",
        ),
        (
            room(100 * GIB, writable=False),
            Level.NO_GO,
            "the shard cache /scratch/runs cannot be written to, and the shards of the stage take 80.0 GiB more.",
        ),
        (room(100 * GIB, kind="nfs4"), Level.WARNING, "the shard cache /scratch/runs is on nfs4."),
    ],
)
def test_copies_of_remote_shards_need_room_on_a_local_disk(volume, level, what):
    finding = cache_finding(90 * GIB, volume, 10 * GIB)
    assert (finding.level, finding.what) == (level, what)
    assert level is Level.OK or "data.cache=DIR" in finding.remedy


def test_all_of_a_stage_is_looked_at_at_once(make_config):
    names = {finding.name for finding in found_by(stage_probes(make_config()), time.monotonic() + 30)}
    assert names == {"data", "tokenizer", "run_directory", "parent", "disk"}
