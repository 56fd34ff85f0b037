"""An FP8 export is the verified bf16 directory rounded, says so twice alike, and every damage of it is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_prolong.engine import fp8_export
from nemo_prolong.engine.fp8_export import dequantize
from nemo_prolong.errors import ExportError
from nemo_prolong.export.run import export
from nemo_prolong.export.serving.calibration import calibration_documents
from nemo_prolong.export.serving.quantized import (
    TensorFiles,
    logit_difference,
    parse_quantization,
    verify_quantization,
    verify_weights,
)
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.serving_tools import target_config

LAYER = "model.layers.1"


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensor(directory: Path, name: str, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def test_the_configuration_is_that_of_bf16_and_the_quantization(bf16, fp8):
    ours, theirs = (json.loads((directory / "config.json").read_text()) for directory in (fp8, bf16))
    quantization = ours.pop("quantization_config")
    assert ours == theirs and ours["rope_theta"] == ours["rope_parameters"]["rope_theta"] == 80000.0
    assert quantization["quant_method"] == "modelopt" and quantization["kv_cache_scheme"]["num_bits"] == 8


def test_the_file_and_its_inline_twin_agree(fp8):
    file = parse_quantization(json.loads((fp8 / "hf_quant_config.json").read_text()))
    inline = parse_quantization(json.loads((fp8 / "config.json").read_text())["quantization_config"])
    assert file == inline
    assert (file.algorithm, file.kv_cache_algorithm, file.excluded) == ("FP8", "FP8", {"lm_head"})


def test_matrices_of_layers_are_fp8_and_the_rest_is_bf16(fp8):
    tensors = load_file(fp8 / "model.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith("_scale")}
    assert len(dtypes) == 21
    for name, dtype in dtypes.items():
        assert dtype == (torch.float8_e4m3fn if "_proj." in name else torch.bfloat16), name


def test_dequantized_weights_give_the_logits_of_bf16(workspace, bf16, fp8):
    document = max(calibration_documents(StageManifest.read(workspace.child), 6, 64), key=len)
    assert 0.0 < logit_difference(bf16, fp8, document, dequantize) < 0.05
    target = json.loads((fp8 / "export_manifest.json").read_text())["target"]
    assert 0.0 < target["quantization"]["relative_logit_difference"] < 0.05
    assert target["quantization"]["verified_matrices"] == 14


def test_every_matrix_has_its_own_scale_unless_inputs_are_shared(bf16, fp8):
    original, quantized = TensorFiles.of(bf16), TensorFiles.of(fp8)
    for parts in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
        modules = [f"{LAYER}.{parts[0]}.{part}_proj" for part in parts[1]]
        for module in modules:
            largest = original.read(f"{module}.weight").float().abs().max()
            torch.testing.assert_close(quantized.read(f"{module}.weight_scale"), largest / 448)
        assert len({float(quantized.read(f"{module}.input_scale")) for module in modules}) == 1


def test_calibration_sees_each_document_by_itself(workspace):
    manifest = StageManifest.read(workspace.child)
    whole, cut = (calibration_documents(manifest, 6, length) for length in (64, 20))
    # Rows of 64 tokens, in documents as `write_data` makes them; single tokens are left out.
    assert {len(document) for document in whole} <= {30, 33, 64, 7, 20, 17, 63, 32, 31, 5}
    assert [len(document) for document in cut] == [min(len(document), 20) for document in whole]
    assert all(torch.equal(short, long[:20]) for short, long in zip(cut, whole, strict=True))


def test_the_manifest_has_the_calibration_and_new_hashes(fp8):
    manifest = json.loads((fp8 / "export_manifest.json").read_text())
    quantization = manifest["target"]["quantization"]
    assert quantization["calibration_rows"] == 6 and quantization["calibration_length"] == 48
    assert quantization["calibration_documents"] > 6 and quantization["modelopt"] == "0.37.0"
    assert manifest["files"].keys() | {"export_manifest.json"} == {path.name for path in fp8.iterdir()}
    for name, file in manifest["files"].items():
        assert hashlib.sha256((fp8 / name).read_bytes()).hexdigest() == file["sha256"], name


def test_a_replaced_file_of_weights_has_the_hash_of_the_new_one(workspace, tmp_path, monkeypatch):
    name, write = "model-00001-of-00001.safetensors", fp8_export.export_hf_checkpoint

    def write_under_our_name(*args, export_dir, **kwargs):
        write(*args, export_dir=export_dir, **kwargs)
        (export_dir / "model.safetensors").rename(export_dir / name)

    monkeypatch.setattr(fp8_export, "export_hf_checkpoint", write_under_our_name)
    cfg = target_config(workspace.child, tmp_path / "fp8", "trtllm", quantization="fp8", max_num_tokens=256)
    export(cfg.model_copy(update={"max_shard_bytes": 2**30, "verify": False}))
    file = json.loads((tmp_path / "fp8" / "export_manifest.json").read_text())["files"][name]
    data = (tmp_path / "fp8" / name).read_bytes()
    assert (file["sha256"], file["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))


def test_a_tied_model_is_quantized_but_its_head_stays_bf16(workspace, tmp_path):
    export(target_config(workspace.tied, tmp_path / "fp8", "trtllm", quantization="fp8", max_num_tokens=64))
    tensors = TensorFiles.of(tmp_path / "fp8")
    assert "lm_head.weight" not in tensors.names
    assert tensors.read("model.embed_tokens.weight").dtype == torch.bfloat16
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["tie_word_embeddings"] is True


def test_an_untouched_copy_passes(bf16, damaged):
    verify_quantization(damaged)
    assert verify_weights(bf16, damaged, dequantize) == 14


WEIGHT = f"{LAYER}.mlp.up_proj.weight"
DAMAGES = {
    "one value": (WEIGHT, lambda t: torch.cat([(t[:1].float() * -1).to(t.dtype), t[1:]])),
    "a NaN": (WEIGHT, lambda t: torch.full_like(t, float("nan"))),
    "bf16 instead": (WEIGHT, lambda t: t.to(torch.bfloat16)),
    "a matrix gone": (WEIGHT, lambda t: None),
    "the scale doubled": (f"{WEIGHT}_scale", lambda t: t * 2),
    "the scale 13% off": (f"{WEIGHT}_scale", lambda t: t * 1.13),
    "no scale": (f"{WEIGHT}_scale", lambda t: None),
    "a scale in bf16": (f"{WEIGHT}_scale", lambda t: t.to(torch.bfloat16)),
    "a zero input scale": (f"{LAYER}.mlp.up_proj.input_scale", torch.zeros_like),
    "an infinite key scale": (f"{LAYER}.self_attn.k_proj.k_scale", lambda t: t / 0),
    "no value scale": (f"{LAYER}.self_attn.v_proj.v_scale", lambda t: None),
    "one bit of a norm": ("model.norm.weight", lambda t: torch.nextafter(t, t + 1)),
    "the LM head in fp16": ("lm_head.weight", lambda t: t.to(torch.float16)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tensor_is_found_by_name(bf16, damaged, damage):
    name, change = DAMAGES[damage]
    change_tensor(damaged, name, change)
    with pytest.raises(ExportError) as caught:
        verify_weights(bf16, damaged, dequantize)
    assert name.removesuffix("_scale") in str(caught.value) and "the export does not equal the model" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("hf_quant_config.json", lambda v: v["quantization"].update(kv_cache_quant_algo=None), "hf_quant_config.json"),
        ("hf_quant_config.json", lambda v: v["quantization"].update(quant_algo="NVFP4"), "hf_quant_config.json"),
        ("hf_quant_config.json", lambda v: v["quantization"].update(exclude_modules=[]), "hf_quant_config.json"),
        ("config.json", lambda v: v["quantization_config"].pop("kv_cache_scheme"), "config.json quantization_config"),
        ("config.json", lambda v: v["quantization_config"].update(ignore=["lm_head", "x"]), "config.json quant"),
        ("config.json", lambda v: v["quantization_config"].update(quant_method="fp8"), "quant_method is fp8"),
        ("config.json", lambda v: v.pop("quantization_config"), "config.json quantization_config"),
    ],
)
def test_descriptions_that_disagree_are_refused(damaged, file, change, message):
    change_json(damaged / file, change)
    with pytest.raises(ExportError) as caught:
        verify_quantization(damaged)
    assert message in str(caught.value)
