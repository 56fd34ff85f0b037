import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from nemo_prolong.errors import CheckpointError
from nemo_prolong.evaluate import transformers_scorer
from nemo_prolong.evaluate.transformers_scorer import TransformersScorer


@pytest.fixture(scope="module")
def scorer(hf_directory):
    return TransformersScorer(hf_directory)


@pytest.fixture
def tokens():
    return torch.randint(0, 290, (101,), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def reference_logits(hf_directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens[None]).logits[0]


@pytest.mark.parametrize("piece_tokens", [1024, 101, 32, 7])
def test_token_losses_do_not_depend_on_the_piece_size(scorer, tokens, reference_logits, piece_tokens, monkeypatch):
    monkeypatch.setattr(scorer, "piece_tokens", piece_tokens)
    losses = scorer.token_losses(tokens)
    assert losses.shape == (100,) and losses.dtype == torch.float32
    expected = cross_entropy(reference_logits[:-1], tokens[1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_token_loss_is_the_loss_transformers_reports(scorer, hf_directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(hf_directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(tokens[None], labels=tokens[None]).loss
    torch.testing.assert_close(scorer.token_losses(tokens).mean(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 31, 32, 33, 100])
def test_logits_from_a_position_on_are_the_tail_of_all_logits(scorer, tokens, reference_logits, start, monkeypatch):
    monkeypatch.setattr(scorer, "piece_tokens", 32)
    logits = scorer.logits(tokens, start=start)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits[start:], rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_makes_pieces_short(hf_directory, scorer, monkeypatch):
    assert scorer.piece_tokens == 8192
    monkeypatch.setattr(transformers_scorer, "LOGITS_BYTES", 4 * scorer.model.config.vocab_size * 100)
    assert TransformersScorer(hf_directory).piece_tokens == 100


def test_the_scorer_names_the_model_as_the_user_wrote_it(scorer, hf_directory):
    assert scorer.name == f"hf:{hf_directory}" and scorer.backend == "transformers"


@pytest.fixture
def copy(hf_directory, tmp_path) -> Path:
    return Path(shutil.copytree(hf_directory, tmp_path / "copy"))


def test_a_directory_with_pickled_weights_only_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file .* can carry code"):
        TransformersScorer(copy)


def test_two_sets_of_weights_are_refused_as_for_a_parent(copy):
    index = {"weight_map": dict.fromkeys(load_file(copy / "model.safetensors"), "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"models=hf:{copy}: it holds two sets of weights, model\.safetensors"):
        TransformersScorer(copy)


def test_a_checkpoint_without_a_weight_is_refused_by_its_name(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        TransformersScorer(copy)


def test_a_truncated_weight_file_is_a_checkpoint_error(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        TransformersScorer(copy)


def test_a_directory_without_a_tokenizer_is_a_checkpoint_error(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    (copy / "special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        TransformersScorer(copy)


def test_code_in_the_directory_is_never_run(copy):
    config = (copy / "config.json").read_text().replace('"llama"', '"own_architecture"')
    config = config.replace("{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},', 1)
    (copy / "config.json").write_text(config)
    (copy / "evil.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        TransformersScorer(copy)
    assert not (copy / "ran").exists()
