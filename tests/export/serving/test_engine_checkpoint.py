"""The checkpoint of the former engine builder, joined over TP and PP again, is the model; every damage is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prolong.config.schema import ExportTargetConfig
from nemo_prolong.engine.fp8_export import dequantize
from nemo_prolong.errors import ExportError
from nemo_prolong.export.run import export
from nemo_prolong.export.serving.engine_checkpoint import verify_engine_checkpoint
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.export_tools import Workspace
from tests.support.serving_tools import target_config

TARGET = ExportTargetConfig(
    format="trtllm_engine_checkpoint", quantization="fp8", tensor_parallel_size=2, pipeline_parallel_size=2
)


def compare(workspace: Workspace, bf16: Path, checkpoint: Path) -> int:
    manifest = StageManifest.read(workspace.child)
    return verify_engine_checkpoint(bf16, checkpoint, manifest.model, 2**19, TARGET, dequantize)


@pytest.fixture
def damaged(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "damaged"))


def test_every_rank_holds_its_part(workspace, bf16, engine):
    # A layer of 7 tensors in every rank; the embedding in the first stage, norm and head in the last.
    assert compare(workspace, bf16, engine) == 4 * 7 + 2 * 1 + 2 * 2


def test_the_configuration_carries_base_and_length(engine):
    config = json.loads((engine / "config.json").read_text())
    assert (config["rotary_base"], config["max_position_embeddings"]) == (80000.0, 524288)
    assert config["dtype"] == "bfloat16" and config["logits_dtype"] == "float32"
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert "Legacy" in (engine / "README.md").read_text()


def test_only_tokenizer_and_stop_tokens_of_the_directory_are_left(engine):
    names = {path.name for path in engine.iterdir()}
    assert not any(name.startswith("model") for name in names)
    assert {f"rank{rank}.safetensors" for rank in range(4)} < names
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names


def test_a_tied_head_is_written_out_in_bf16(workspace, tmp_path):
    export(target_config(workspace.tied, tmp_path / "tied", "trtllm_engine_checkpoint", tensor_parallel_size=2))
    ranks = [load_file(tmp_path / "tied" / f"rank{rank}.safetensors") for rank in range(2)]
    for tensors in ranks:
        assert torch.equal(tensors["lm_head.weight"], tensors["transformer.vocab_embedding.weight"])
    assert json.loads((tmp_path / "tied" / "config.json").read_text())["quantization"]["quant_algo"] is None


ATTENTION = "transformer.layers.0.attention"


@pytest.mark.parametrize(
    ("rank", "name", "change"),
    [
        (
            0,
            "transformer.layers.0.mlp.fc.weight",
            lambda tensors, name: tensors["transformer.layers.0.mlp.gate.weight"],
        ),
        (1, f"{ATTENTION}.qkv.weight", lambda tensors, name: tensors[name].flip(0)),
        (2, f"{ATTENTION}.qkv.weights_scaling_factor", lambda tensors, name: tensors[name] * 1.2),
        (2, f"{ATTENTION}.dense.weight", lambda tensors, name: None),
        (3, "lm_head.weight", lambda tensors, name: tensors[name].flip(0)),
        (3, "transformer.ln_f.weight", lambda tensors, name: tensors[name] + 1),
        (3, "transformer.layers.1.input_layernorm.weight", lambda tensors, name: tensors["transformer.ln_f.weight"]),
    ],
)
def test_a_damaged_tensor_is_found(workspace, bf16, damaged, rank, name, change):
    path = damaged / f"rank{rank}.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors, name)
    save_file({key: value.clone() for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(ExportError) as caught:
        compare(workspace, bf16, damaged)
    assert name.replace("weights_scaling_factor", "weight") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rotary_base", 10000.0), ("max_position_embeddings", 64), ("dtype", "float16"), ("num_key_value_heads", 4)],
)
def test_a_wrong_configuration_is_found(workspace, bf16, damaged, key, value):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ExportError, match=f"config.json {key}={value}: the export does not equal the model"):
        compare(workspace, bf16, damaged)
