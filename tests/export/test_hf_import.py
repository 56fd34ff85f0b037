"""A Hugging Face directory becomes a stage and leaves it again with the same bits."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemo_prolong.config.schema import MixtureEntry, RunConfig
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.errors import CheckpointError
from nemo_prolong.export.run import export
from nemo_prolong.records.checkpoint.verify import newest_checkpoint
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from nemo_prolong.weights.hf_directory import HuggingFaceDirectory
from nemo_prolong.weights.hf_reader import HuggingFaceReader
from nemo_prolong.weights.names import pieces
from tests.support.export_tools import Workspace, export_config
from tests.support.hf_models import VARIANTS, copy_with_tokenizer, write_llama
from tests.support.launches import run_module
from tests.support.tiny import SEQ_LENGTH, VOCAB_SIZE, read_metrics, tiny_config

ROOT = Path(__file__).parents[2]

# So small a step that no fp32 weight changes.
NO_STEP = {"lr": 1e-30, "min_lr": 1e-30}

ROPE_IN_THE_CARD = {
    "llama-3": "without scaling",
    "llama-3.1": "with the scaling of Llama-3.1 (factor 8 over 64 positions)",
    "llama-3.2": "with the scaling of Llama-3.1 (factor 32 over 64 positions)",
}


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def stage_from(workspace: Workspace, directory: Path, name: str, **changes: Any) -> RunConfig:
    """Return a stage that starts from a directory and has its model."""
    found = HuggingFaceDirectory(directory)
    model = {**found.model_fields(), "rotary_base": found.rotary_base, **changes.pop("model", {})}
    settings = {"train": {"train_iters": 1}, "optim": NO_STEP, **changes}
    return tiny_config(
        workspace.root / "data", workspace.root, name=name, stage="stage1", parent=f"hf:{directory}",
        transition="weights", model=model, **settings,
    )  # fmt: skip


def mean_loss(directory: Path, data: Path, rows: range) -> float:
    """Return what transformers computes for the target tokens of rows, each document by itself."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    dataset = PackedRowDataset(data, [MixtureEntry(path="rows", proportion=1.0)], SEQ_LENGTH, 42, len(rows))
    total, targets = 0.0, 0.0
    for row in (dataset[index] for index in rows):
        bounds = row.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            with torch.inference_mode():
                logits = model(row.tokens[None, start:end]).logits[0].double()
            losses = cross_entropy(logits, row.labels[start:end], reduction="none")
            total += float((losses * row.loss_mask[start:end]).sum())
            targets += float(row.loss_mask[start:end].sum())
    return total / targets


@pytest.fixture(scope="session")
def llamas(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llamas")
    tokenizer = AutoTokenizer.from_pretrained(workspace.root / "data" / "tokenizer")
    written = {name: write_llama(root / name, tokenizer, **changes) for name, changes in VARIANTS.items()}
    # As in Llama-3.1's own: more ends than the tokenizer names, and how to sample.
    generation = {"eos_token_id": [497, 504, 505], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (written["llama-3.1"] / "generation_config.json").write_text(json.dumps(generation))
    return written


@pytest.mark.parametrize("name", VARIANTS)
def test_a_llama_comes_back_from_megatron_unchanged(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from nemo_prolong.stages.run import run_stage

    cfg = stage_from(workspace, llamas[name], name)
    run_stage(cfg, [])
    export(export_config(Path(cfg.run_dir), tmp_path / "hf"))

    before, after = load_tensors(llamas[name]), load_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    configs = [AutoConfig.from_pretrained(directory).to_dict() for directory in (llamas[name], tmp_path / "hf")]
    ours_alone = {"rope_parameters", "_name_or_path", "transformers_version", "torch_dtype"}
    differing = {key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key)}
    assert differing - ours_alone == set()
    loss = read_metrics(Path(cfg.run_dir))[0]["loss"]
    assert loss == pytest.approx(mean_loss(llamas[name], workspace.root / "data", range(4)), abs=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"Its RoPE base is 10000 {ROPE_IN_THE_CARD[name]}. The weights are in" in card


def test_the_record_of_the_parent_has_its_hash_context_and_rope_base(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from nemo_prolong.stages.run import run_stage

    cfg = stage_from(workspace, llamas["llama-3.1"], "record", model={"rotary_base": 80000.0})
    run_stage(cfg, [])
    manifest = StageManifest.read(Path(cfg.run_dir))
    assert manifest.parent is not None
    expected = {
        "path": f"hf:{llamas['llama-3.1']}",
        "step": 0,
        "transition": "weights",
        "sha256": HuggingFaceDirectory(llamas["llama-3.1"]).sha256(),
        "context_length": 512,
        "rotary_base": 10000.0,
    }
    assert manifest.parent.model_dump(include=set(expected)) == expected
    assert (manifest.trained_context_length, manifest.rotary_base) == (512, 80000.0)
    assert "RoPE base: 10000 in the parent, 80000 from here on" in capfd.readouterr().out
    export(export_config(Path(cfg.run_dir), tmp_path / "hf", verify=False))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"continues `hf:{llamas['llama-3.1']}` (rotary_base 10000), not described here." in card
    assert manifest.parent.stop_token_ids == manifest.stop_token_ids == [497, 504, 505]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [497, 504, 505]
    assert not generation.keys() & {"do_sample", "temperature", "top_p"}


def test_two_steps_from_an_export_begin_with_its_loss(workspace: Workspace, exported: Path, tmp_path: Path) -> None:
    model = HuggingFaceDirectory(exported).model_fields()
    command = [
        sys.executable, "scripts/train.py", "+exp=mini/stage1", f"parent=hf:{exported}", "name=two_steps",
        f"runs_dir={tmp_path}", "seq_length=64", "train.train_iters=2", "train.global_batch_size=4",
        "train.val_check_interval=0", "advertised_context_length=512K", f"data.root={workspace.root / 'data'}",
        "data.mixture=[{path:rows,proportion:1.0}]", "data.validation=[]", "data.num_workers=0",
        *(f"model.{key}={'null' if value is None else value}" for key, value in model.items()),
        "optim.lr_warmup_iters=1",
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"takes weights of hf:{exported}" in result.stdout
    losses = [record["loss"] for record in read_metrics(tmp_path / "two_steps")]
    expected = mean_loss(exported, workspace.root / "data", range(4))
    assert len(losses) == 2 and losses[0] == pytest.approx(expected, abs=1e-5)


def test_a_bf16_stage_starts_from_the_weights_of_the_directory(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path
) -> None:
    from nemo_prolong.stages.run import run_stage

    cfg = stage_from(workspace, llamas["llama-3"], "bf16_from_directory", precision={"compute": "bf16"})
    run_stage(cfg, [])
    # After a step the weights are those that the optimizer keeps in fp32.
    export(export_config(Path(cfg.run_dir), tmp_path / "hf", verify=False))
    before, after = load_tensors(llamas["llama-3"]), load_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key].bfloat16(), after[key].bfloat16())] == []


LAYOUTS: dict[str, dict[str, Any]] = {
    # 768 rows of the embedding for 512 tokens: the last rank's slice ends in padding.
    "four ranks of two layers and two slices": {
        "parallelism": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        "model": {"make_vocab_size_divisible_by": 384},
        "layout": {"world_size": 4, "tensor": 2, "pipeline": 2, "context": 1, "data": 1},
    },
    # Of 768 rows the second rank has the last 128 of the directory, the 188 new ones and 68 of padding.
    "two slices of a vocabulary that grows": {
        "directory": "llama-3",
        "parallelism": {"tensor_model_parallel_size": 2},
        "model": {"vocab_size": 700},
        "layout": {"world_size": 2, "tensor": 2, "pipeline": 1, "context": 1, "data": 1},
    },
    "two ranks that share every document": {
        "parallelism": {"context_parallel_size": 2},
        "layout": {"world_size": 2, "tensor": 1, "pipeline": 1, "context": 2, "data": 1},
    },
}


@pytest.fixture(scope="module")
def trained_at_layouts(
    workspace: Workspace, llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs from a directory by layout, all in forks of one program."""
    stages = {
        name: stage_from(
            workspace,
            llamas[changes.get("directory", "llama-3.2")],
            f"layout_{index}",
            **{key: value for key, value in changes.items() if key not in ("directory", "layout")},
        )
        for index, (name, changes) in enumerate(LAYOUTS.items())
    }
    jobs = [
        {
            "config": cfg.model_dump(mode="json"),
            "ranks": LAYOUTS[name]["layout"]["world_size"],
            "log": f"{cfg.run_dir}.log",
        }
        for name, cfg in stages.items()
    ]
    path = tmp_path_factory.mktemp("layouts") / "jobs.json"
    path.write_text(json.dumps(jobs))
    run_module("tests.export.ranks_program", str(path))
    return {name: Path(cfg.run_dir) for name, cfg in stages.items()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_layout_read_the_directory_and_can_be_exported(
    workspace: Workspace, llamas: dict[str, Path], trained_at_layouts: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    directory, run = llamas[LAYOUTS[layout].get("directory", "llama-3.2")], trained_at_layouts[layout]
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None and len(list((checkpoint / "weights").glob("*.distcp"))) > 2
    assert json.loads((checkpoint / "manifest.json").read_text())["layout"] == LAYOUTS[layout]["layout"]
    export(export_config(run, tmp_path / "hf"))
    before, after = grown(load_tensors(directory), LAYOUTS[layout]), load_tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    loss = read_metrics(run)[0]["loss"]
    assert loss == pytest.approx(mean_loss(tmp_path / "hf", workspace.root / "data", range(4)), abs=1e-5)


def grown(tensors: dict[str, torch.Tensor], changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model whose new tokens have the mean of all rows."""
    vocab_size = changes.get("model", {}).get("vocab_size", VOCAB_SIZE)
    result = dict(tensors)
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        mean = tensors[name].double().mean(dim=0, keepdim=True).float()
        result[name] = torch.cat([tensors[name], mean.expand(vocab_size - len(tensors[name]), -1)])
    return result


def test_a_grown_vocabulary_is_recorded_and_announced(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from nemo_prolong.stages.run import run_stage

    # A tied head, and names as torch.compile leaves them.
    directory = wrapped_copy(llamas["llama-3.2"], tmp_path / "llama", "_orig_mod.")
    cfg = stage_from(workspace, directory, "grown", model={"vocab_size": 514})
    run_stage(cfg, [])
    said = (
        "the vocabulary grows from 512 to 514 tokens, and the new rows of embedding and LM head are the mean of the "
        "parent's",
        "names of the parent's tensors are read without _orig_mod",
    )
    manifest = StageManifest.read(Path(cfg.run_dir))
    assert manifest.parent is not None
    assert (manifest.parent.grown_vocab_rows, manifest.parent.wrappers) == (2, ["_orig_mod"])
    events = map(json.loads, (Path(cfg.run_dir) / "events.jsonl").read_text().splitlines())
    assert {event["detail"] for event in events if event["event"] == "parent_changed"} == set(said)
    console = capfd.readouterr().out
    assert [sentence for sentence in said if sentence not in console] == []
    export(export_config(Path(cfg.run_dir), tmp_path / "hf"))
    before, after = (
        grown(load_tensors(llamas["llama-3.2"]), {"model": {"vocab_size": 514}}),
        load_tensors(tmp_path / "hf"),
    )
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "vocabulary grown by 2 rows, each at first the mean of the others" in card


def wrapped_copy(directory: Path, target: Path, prefix: str) -> Path:
    """Write a model into one file, its tensors under names with a prefix."""
    target.mkdir()
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    save_file(
        {f"{prefix}{name}": tensor for name, tensor in load_tensors(directory).items()}, target / "model.safetensors"
    )
    return target


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path, value: float
) -> None:
    from nemo_prolong.stages.run import run_stage

    directory = wrapped_copy(llamas["llama-3"], tmp_path / "llama", "")
    tensors = load_tensors(directory)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5:8] = value
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        run_stage(stage_from(workspace, directory, f"no_number_{value}"), [])
    assert str(refusal.value) == (
        f"parent=hf:{directory}: 4 of its weights are NaN or infinite: model.layers.0.mlp.up_proj.weight (1), "
        "model.layers.1.self_attn.k_proj.weight (3). Download or save the model again. Weights in F16 overflow where "
        "BF16 and F32 do not."
    )


def test_a_parent_run_with_a_weight_that_is_no_number_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_prolong.engine.training.trainer import StageStrategy
    from nemo_prolong.stages.run import run_stage

    load = StageStrategy.load_model_state_dict

    def load_and_spoil(self: StageStrategy, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        for name, parameter in self.megatron_parallel.named_parameters():
            if name.endswith("decoder.final_layernorm.weight"):
                parameter.data[:2] = torch.nan

    monkeypatch.setattr(StageStrategy, "load_model_state_dict", load_and_spoil)
    cfg = tiny_config(
        workspace.root / "data", workspace.root, name="of_nan", stage="stage1", parent=str(workspace.base),
        transition="weights",
    )  # fmt: skip
    message = r"parent=.*step_00000016: 2 of its weights are NaN or infinite: .*final_layernorm\.weight \(2\)\. Use"
    with pytest.raises(CheckpointError, match=message):
        run_stage(cfg, [])


def test_a_weight_that_a_restore_leaves_out_is_refused_by_name(
    workspace: Workspace, llamas: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_prolong.engine.checkpoint import hf_restore
    from nemo_prolong.stages.run import run_stage

    fill = hf_restore._fill

    def forget_a_norm(tensor: Any, reader: HuggingFaceReader) -> dict[str, int]:
        return {} if "mlp.linear_fc1.layer_norm_weight" in tensor.key else fill(tensor, reader)

    monkeypatch.setattr(hf_restore, "_fill", forget_a_norm)
    cfg = stage_from(workspace, llamas["llama-3"], "of_a_part")
    message = r"parent=hf:.*: 128 of its weights are NaN or infinite: .*layers\.0\.pre_mlp_layernorm\.weight \(64\), "
    with pytest.raises(CheckpointError, match=message):
        run_stage(cfg, [])


def test_a_stage_with_a_parent_draws_no_weights(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_prolong.engine.model import gpt_model
    from nemo_prolong.stages.run import run_stage

    drawn, poisoned = [], []
    draw, poison = torch.nn.init.normal_, gpt_model._fill_with_nan

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(tensor.numel())
        return draw(tensor, *args, **kwargs)

    def poison_and_look(model: torch.nn.Module) -> None:
        poison(model)
        poisoned.extend(bool(parameter.isnan().all()) for parameter in model.parameters())

    monkeypatch.setattr(torch.nn.init, "normal_", count)
    monkeypatch.setattr(gpt_model, "_fill_with_nan", poison_and_look)
    stages = {"drawn": {"transition": "scratch", "parent": None}, "restored": {"parent": str(workspace.base)}}
    for name, parent in stages.items():
        settings = {"stage": "stage1", "transition": "weights", "train": {"train_iters": 1}, "optim": NO_STEP} | parent
        run_stage(tiny_config(workspace.root / "data", workspace.root, name=f"{name}_weights", **settings), [])
        assert (sum(drawn) > 10_000, len(poisoned) > 10) == (name == "drawn", name == "restored")
        drawn.clear()
    assert all(poisoned)
    # What was NaN is the parent's, to the last bit: the learning rate is too small to move it.
    runs = [workspace.root / "restored_weights", workspace.base]
    before, after = (CheckpointReader(newest_checkpoint(run)) for run in runs)
    assert set(before.names()) == set(after.names())
    weights = [name for name in before.names() if name.endswith("weight") and "optimizer" not in name]
    assert len(weights) > 5
    assert [name for name in weights if not torch.equal(before.read(name), after.read(name))] == []


def test_any_box_of_a_tensor_is_read_as_it_lies_in_the_whole(workspace: Workspace, exported: Path) -> None:
    model = StageManifest.read(workspace.child).model
    reader = HuggingFaceReader(HuggingFaceDirectory(exported), model)
    for piece in pieces(model):
        name, layer = piece.rule.megatron, piece.layer
        rows, *columns = sum(shape[0] for shape in piece.shapes), *piece.shapes[0][1:]
        whole = torch.full((rows + 8, *columns), torch.nan)
        reader.fill(whole, name, layer)
        assert torch.equal(whole[rows:], torch.zeros(8, *columns)), "the padding of a vocabulary is zero"
        part = torch.full((11, *(size // 2 for size in columns)), torch.nan)
        reader.fill(part, name, layer, 7, *(size // 2 for size in columns))
        expected = whole[7:18] if not columns else whole[7:18, columns[0] // 2 :]
        assert torch.equal(part, expected), name


def test_a_tokenizer_with_other_ids_than_the_models_is_refused(
    workspace: Workspace, llamas: dict[str, Path], tmp_path: Path
) -> None:
    from nemo_prolong.errors import DataError
    from nemo_prolong.stages.hf_parent import check_hugging_face_parent

    directory = tmp_path / "llama"
    directory.mkdir()
    for path in llamas["llama-3"].iterdir():
        (directory / path.name).symlink_to(path)
    copy_with_tokenizer(directory, workspace.root / "data" / "tokenizer")
    cfg = stage_from(workspace, directory, "tokens")
    assert check_hugging_face_parent(cfg, weights=True).context_length == 128
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"2 tokens of hf:.* have other ids in .*: 'b' is \d+ there and \d+ here\."):
        check_hugging_face_parent(cfg, weights=True)
