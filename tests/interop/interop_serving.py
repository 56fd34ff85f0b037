"""What other software makes of exports: an OpenAI-compatible server answers the same, compressed-tensors reads FP8."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import NaiveQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_prolong.export.serving.check_server import request, wait_until_healthy

EXPORTS = Path(os.environ["INTEROP_EXPORTS"])
CHAT = [{"role": "user", "content": "def add(first, second):"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``transformers serve`` with the untied export."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(EXPORTS / "untied")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(url, 90)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def ask(url: str, path: str, **body: object) -> dict:
    body = {"model": str(EXPORTS / "untied"), "max_tokens": 16, "temperature": 0, **body}
    status, answer = request(f"{url}{path}", body, 60)
    assert status == 200, answer
    return answer


def test_the_server_continues_with_the_same_greedy_tokens(server: str) -> None:
    recorded = json.loads((EXPORTS / "untied.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(EXPORTS / "untied")
    prompt = "def add(first, second):"
    new = recorded["greedy"][len(tokenizer(prompt)["input_ids"]) :]
    answer = ask(server, "/v1/completions", prompt=prompt)
    assert answer["choices"][0]["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert answer["usage"]["completion_tokens"] == len(new)


def test_the_server_answers_with_the_tokens_of_generate(server: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXPORTS / "untied")
    model = AutoModelForCausalLM.from_pretrained(EXPORTS / "untied")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = ask(server, "/v1/chat/completions", messages=CHAT)
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(output, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]


def test_compressed_tensors_reads_the_quantization() -> None:
    inline = json.loads((EXPORTS / "fp8" / "config.json").read_text())["quantization_config"]
    theirs = {"config_groups", "ignore", "kv_cache_scheme"}
    config = QuantizationConfig.model_validate({key: inline[key] for key in theirs})
    (scheme,) = config.config_groups.values()
    for numbers in (scheme.weights, scheme.input_activations, config.kv_cache_scheme):
        assert numbers.pytorch_dtype() == torch.float8_e4m3fn and numbers.dynamic is False
    assert config.ignore == ["lm_head"] and scheme.targets == ["Linear"]


@torch.inference_mode()
def test_dequantized_weights_give_logits_within_five_percent_of_bf16() -> None:
    inline = json.loads((EXPORTS / "fp8" / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate({"config_groups": inline["config_groups"]}).config_groups.values()
    model = AutoModelForCausalLM.from_pretrained(EXPORTS / "bf16", dtype=torch.float32).eval()
    tokens = torch.arange(64)[None] * 7 % model.config.vocab_size
    before = model(tokens, use_cache=False).logits
    stored = load_file(EXPORTS / "fp8" / "model.safetensors")
    read = 0
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in stored:
            local = {key: stored[f"{name}.{key}"] for key in ("weight", "weight_scale")}
            weight = NaiveQuantizationCompressor.decompress(local, scheme)["weight"].float()
            # Three mantissa bits: 2.6% on average. The logits of a tiny model alone would not see one wrong scale.
            assert (weight - module.weight).norm() / module.weight.norm() < 0.04, name
            module.weight.copy_(weight)
            read += 1
    after = model(tokens, use_cache=False).logits
    assert read == 14
    assert 0 < (after - before).norm() / before.norm() < 0.05
