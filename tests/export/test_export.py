"""A real NeMo checkpoint leaves as a directory that plain transformers loads and computes the same with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_prolong.engine import open_megatron_scorer
from nemo_prolong.export.run import export
from nemo_prolong.export.source import open_source
from tests.support.export_tools import Workspace, export_config, write_perplexity, write_recall

CHAT = [{"role": "user", "content": " Hi <|eot_id|> there "}]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_transformers_computes_the_logits_of_megatron(workspace: Workspace, exported: Path) -> None:
    tokens = torch.arange(300) * 7 % 512
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.float32
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0]
    megatron = open_megatron_scorer(workspace.child).logits(tokens)
    assert float((logits - megatron).abs().max()) <= 1e-4
    assert torch.equal(logits.argmax(-1), megatron.argmax(-1))


def test_the_verification_is_recorded_with_its_prompts(exported: Path) -> None:
    verification = read_json(exported / "export_manifest.json")["verification"]
    assert verification["tensors"] == len(load_tensors(exported)) == 21
    assert 0 <= verification["max_logit_difference"] <= 1e-4
    assert [prompt["tokens"] for prompt in verification["prompts"]] == [1, 67, 509, 512]
    assert verification["prompts"][-1]["last_position"] == 2**19 - 1
    assert verification["greedy"]["equal"] == verification["greedy"]["tokens"] > 0


def test_a_context_that_fits_is_scored_whole(workspace: Workspace, tmp_path: Path) -> None:
    export(export_config(workspace.base, tmp_path / "hf"))
    prompts = read_json(tmp_path / "hf" / "export_manifest.json")["verification"]["prompts"]
    assert [prompt["tokens"] for prompt in prompts] == [1, 67, 509, 4096, 512]
    assert prompts[3]["compared_positions"] == 1024


def test_both_major_versions_of_transformers_find_the_rope_base(exported: Path) -> None:
    config = read_json(exported / "config.json")
    assert config["rope_theta"] == 80000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 80000.0}
    assert config["rope_scaling"] is None
    assert config["max_position_embeddings"] == 2**19
    assert (config["vocab_size"], config["head_dim"]) == (512, 16)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["attention_bias"], config["mlp_bias"], config["tie_word_embeddings"]) == (False, False, False)
    assert not [key for key in config if key in ("auto_map", "quantization_config")]


def test_the_tokenizer_and_its_chat_template_arrive(workspace: Workspace, exported: Path) -> None:
    source = AutoTokenizer.from_pretrained(workspace.root / "data" / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert ids == source.apply_chat_template(CHAT, add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi")
    assert tokenizer.model_max_length == 2**19
    template = read_json(exported / "tokenizer_config.json")["chat_template"]
    assert template == (exported / "chat_template.jinja").read_text() == source.chat_template


def test_generation_stops_at_the_end_of_text_or_turn(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    prompt = tokenizer("def f", return_tensors="pt")
    for token in ("<|end_of_text|>", "<|eot_id|>"):
        stop_id = tokenizer.convert_tokens_to_ids(token)

        def only_stop(batch: int, ids: torch.Tensor, stop_id: int = stop_id) -> list[int]:
            return [stop_id]

        generated = model.generate(**prompt, max_new_tokens=5, prefix_allowed_tokens_fn=only_stop)
        assert generated[0].tolist() == [*prompt["input_ids"][0].tolist(), stop_id], token


def test_the_manifest_has_source_and_hash_of_every_file(exported: Path) -> None:
    manifest = read_json(exported / "export_manifest.json")
    files = {path.name for path in exported.iterdir()} - {"export_manifest.json"}
    assert manifest["files"].keys() == files
    for name, entry in manifest["files"].items():
        data = (exported / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert (manifest["source"]["name"], manifest["source"]["step"]) == ("child", 4)
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert (manifest["rotary_base"], manifest["advertised_context_length"]) == (80000.0, 2**19)


def test_the_index_names_every_shard_and_the_size(exported: Path) -> None:
    index = read_json(exported / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {path.name for path in exported.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 3
    tensors = load_tensors(exported)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_model_card_tells_the_lineage(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "# tiny-llama, 512K tokens of context" in card
    assert "| base | nothing, random weights | 64 | 10000 | 16 |" in card
    assert "| stage2 | weights and optimizer | 64 | 80000 | 4 |" in card
    assert "| stage2 | rows | 100.0% |" in card
    assert "positions up to 524287" in card
    assert "- megatron-core 0.15.3" in card
    assert "under: Apache-2.0." in card


def test_the_model_card_shows_the_evaluation_of_the_run(workspace: Workspace, tmp_path: Path) -> None:
    results = workspace.tied / "eval"
    results.mkdir()
    write_perplexity(results)
    write_recall(results)
    export(export_config(workspace.tied, tmp_path / "hf", verify=False))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| 0 to 512 | 600 | 54.60 |" in card
    assert "512 to 2048" not in card
    assert "| 512 | 8 | 25% | 3.22 |" in card
    assert "was not compared" in card
    assert read_json(tmp_path / "hf" / "export_manifest.json")["verification"] is None


def test_the_model_card_shows_the_evaluation_of_parents(workspace: Workspace, tmp_path: Path) -> None:
    results = workspace.base / "eval"
    results.mkdir()
    write_perplexity(results)
    export(export_config(workspace.child, tmp_path / "hf", verify=False))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Perplexity of `base` by position, on `data/validation`:" in card


def test_a_bf16_export_passes_the_same_bound(workspace: Workspace, exported: Path, tmp_path: Path) -> None:
    export(export_config(workspace.child, tmp_path / "hf", dtype="bf16"))
    exact, rounded = load_tensors(exported), load_tensors(tmp_path / "hf")
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    manifest = read_json(tmp_path / "hf" / "export_manifest.json")
    assert manifest["dtype"] == "bfloat16"
    assert manifest["verification"]["max_logit_difference"] <= 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_tied_model_with_a_padded_vocabulary_is_exported(workspace: Workspace, tmp_path: Path, dtype: str) -> None:
    export(export_config(workspace.tied, tmp_path / "hf", dtype=dtype))
    tensors = load_tensors(tmp_path / "hf")
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].shape == (512, 64)
    assert open_source(str(workspace.tied)).reader.shape("embedding.word_embeddings.weight") == (768, 64)
    assert read_json(tmp_path / "hf" / "config.json")["tie_word_embeddings"] is True


def test_one_layer_is_read_as_it_lies_in_the_stack(workspace: Workspace) -> None:
    reader = open_source(str(workspace.base)).reader
    stacked = [name for name in reader.names() if name.startswith("decoder.layers.")]
    assert len(stacked) == 6
    for name in stacked:
        whole = reader.read(name)
        for layer in range(2):
            assert torch.equal(reader.read_layer(name, layer), whole[layer]), (name, layer)


def test_an_export_is_replaced_only_when_asked(workspace: Workspace, tmp_path: Path) -> None:
    from nemo_prolong.errors import ExportError

    output = tmp_path / "hf"
    export(export_config(workspace.base, output, verify=False))
    first = read_json(output / "export_manifest.json")["files"]
    with pytest.raises(ExportError, match="it already exists"):
        export(export_config(workspace.base, output, verify=False))
    export(export_config(workspace.base, output, verify=False, overwrite=True))
    assert read_json(output / "export_manifest.json")["files"] == first


def test_the_console_shows_our_lines_and_how_to_load_the_model(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(export_config(workspace.base, tmp_path / "hf"))
    lines = capfd.readouterr().out.splitlines()
    assert f"exporting {workspace.base} as fp32 to {tmp_path / 'hf'}; library output goes to" in lines[0]
    assert "checkpoint of step 16, rotary_base 10000" in "".join(lines)
    assert "bitwise equal to the checkpoint" in "".join(lines)
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "hf"}")' in lines[-1]
    assert [line for line in lines[:-1] if line[2:6:3] != "::"] == [], "a line of a library got through"
