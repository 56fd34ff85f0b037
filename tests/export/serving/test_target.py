"""What a target refuses before anything is written, and the files that start a server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from nemo_prolong.errors import ConfigError, ExportError
from nemo_prolong.export.run import export
from nemo_prolong.export.serving.settings import TrtllmSettings, VllmSettings, read_settings
from nemo_prolong.export.serving.target import check_target
from nemo_prolong.records.stage_manifest import StageManifest
from tests.support.export_tools import export_config
from tests.support.serving_tools import target_config

DOCKER = Path(__file__).parents[3] / "docker" / "serve"
SIZES = ("--max_batch_size", "1", "--max_num_tokens", "256", "--max_seq_len", "524288")


@pytest.fixture(scope="module")
def vllm(workspace) -> Path:
    export(target_config(workspace.child, workspace.root / "vllm", "vllm", tensor_parallel_size=2))
    return workspace.root / "vllm"


def test_settings_of_trtllm_have_the_advertised_length(fp8):
    settings = read_settings(fp8 / "serve.yaml", TrtllmSettings)
    assert settings.model_dump() == {
        "tensor_parallel_size": 1,
        "max_seq_len": 524288,
        "max_batch_size": 1,
        "max_num_tokens": 256,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.9},
    }
    assert "#   keys and values  64.0 MiB needed" in (fp8 / "serve.yaml").read_text()


def test_settings_of_vllm_have_the_advertised_length(vllm):
    read_settings(vllm / "serve.yaml", VllmSettings)
    assert yaml.safe_load((vllm / "serve.yaml").read_text()) == {
        "dtype": "bfloat16",
        "tensor-parallel-size": 2,
        "max-model-len": 524288,
        "max-num-seqs": 1,
        "max-num-batched-tokens": 8192,
        "enable-chunked-prefill": True,
        "kv-cache-dtype": "auto",
        "gpu-memory-utilization": 0.9,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_seq_len": "512K"}, "max_seq_len"),
        ({"kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 1.5}}, "free_gpu_memory_fraction"),
        ({"kv_cache_config": {"dtype": "int8", "free_gpu_memory_fraction": 0.9}}, "dtype"),
    ],
)
def test_settings_that_the_server_would_refuse_are_found(fp8, tmp_path, change, message):
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load((fp8 / "serve.yaml").read_text()), **change}))
    with pytest.raises(ExportError, match=rf"the server would refuse it: (?s:.*){message}"):
        read_settings(path, TrtllmSettings)


@pytest.mark.parametrize(
    ("kind", "program", "flags"),
    [
        # The sizes twice: versions of TensorRT-LLM differ in whether the file or the command line wins.
        ("fp8", "trtllm-serve", [*SIZES, "--extra_llm_api_options"]),
        ("vllm", "vllm", ["--config"]),
    ],
)
def test_the_start_script_serves_from_anywhere(request, tmp_path, kind, program, flags):
    directory = request.getfixturevalue(kind)
    (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PORT": "8123"}
    done = subprocess.run(
        [directory / "serve.sh", "--log_level", "debug"],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=True,
    )
    serve = ["serve"] if kind == "vllm" else []
    address = ["--host", "127.0.0.1", "--port", "8123"]
    assert done.stdout.splitlines() == [
        *serve, str(directory), *address, *flags, f"{directory}/serve.yaml", "--log_level", "debug",
    ]  # fmt: skip


def test_the_bf16_weights_for_a_server_are_the_plain_ones(bf16, vllm):
    for path in bf16.glob("model*"):
        assert (vllm / path.name).read_bytes() == path.read_bytes()


def check(cfg):
    """Check the target of an export of ``cfg.run``."""
    manifest = StageManifest.read(Path(cfg.run))
    check_target(cfg, manifest.model, manifest.advertised_context_length)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "fp32"}, "dtype=fp32: export=trtllm serves bf16 or FP8 of bf16. Set dtype=bf16."),
        (
            {"export": {"format": "hf", "quantization": "fp8"}},
            "transformers does not read it: the scales would be ignored",
        ),
        ({"verify": False, "export": {"push_to_hub": "a/b"}}, "verify=false: only what was compared is published."),
        ({"export": {"format": "trtllm", "max_num_tokens": 100}}, "Set export.max_num_tokens=64."),
        (
            {"export": {"format": "vllm", "max_num_tokens": 64, "max_batch_size": 65}},
            "export.max_batch_size=65: a step has a token of every request, and export.max_num_tokens is 64. "
            "Set export.max_batch_size=64, or more export.max_num_tokens.",
        ),
        ({"export": {"format": "vllm", "pipeline_parallel_size": 2}}, "belongs to trtllm_engine_checkpoint."),
    ],
)
def test_settings_that_contradict_each_other_are_refused(workspace, tmp_path, changes, message):
    values = {"dtype": "bf16", "export": {"format": "trtllm"}, **changes}
    with pytest.raises(ConfigError) as caught:
        check(export_config(workspace.child, tmp_path / "out", **values))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 4}, "must divide the 2 key-value heads and the 2 layers."),
        ({"pipeline_parallel_size": 3}, "must divide the 2 key-value heads and the 2 layers."),
    ],
)
def test_layouts_that_an_engine_cannot_have_are_refused(workspace, tmp_path, changes, message):
    cfg = target_config(workspace.child, tmp_path / "out", "trtllm_engine_checkpoint", **changes)
    with pytest.raises(ExportError) as caught:
        check(cfg)
    assert message in str(caught.value)


def test_what_does_not_fit_is_refused_before_the_export_begins(workspace, tmp_path):
    cfg = target_config(workspace.child, tmp_path / "out", "vllm", max_batch_size=5_000)
    with pytest.raises(ExportError, match=r"5000 x 512K tokens do not fit.*Set export\.max_batch_size="):
        check(cfg)


def test_a_failed_quantization_leaves_nothing(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_prolong.engine.fp8_export.export_hf_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(target_config(workspace.child, tmp_path / "out", "trtllm", quantization="fp8"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_for_a_server_can_be_replaced(fp8, workspace):
    cfg = target_config(workspace.child, fp8, "trtllm", quantization="fp8", max_num_tokens=256)
    export(cfg.model_copy(update={"overwrite": True}))
    assert (fp8 / "serve.sh").is_file()


def test_the_compose_file_starts_what_an_export_writes(fp8):
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services.keys() == {"trtllm", "vllm"}
    for service in services.values():
        assert service["entrypoint"] == ["bash", "/model/serve.sh"] and (fp8 / "serve.sh").is_file()
        assert service["volumes"] == ["${MODEL_DIR:?set it to an exported directory}:/model:ro"]


def test_the_directory_has_what_llama_cpp_reads(bf16):
    """As its source has it: architecture and sizes, files called model*.safetensors, a BPE tokenizer with merges."""
    config = json.loads((bf16 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    read = {"num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads"}
    assert read | {"num_key_value_heads", "rope_theta", "rms_norm_eps", "head_dim", "vocab_size"} <= config.keys()
    parts = sorted(path.name for path in bf16.glob("*.safetensors"))
    assert parts and all(name.startswith("model") for name in parts)
    tokenizer = json.loads((bf16 / "tokenizer.json").read_text())
    assert tokenizer["model"]["type"] == "BPE" and tokenizer["model"]["merges"]
