"""The JSON files of an export, from what the run and its tokenizer say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_prolong.config.schema import RopeScaling
from nemo_prolong.data.tokenizer import BOS, EOS
from nemo_prolong.errors import ExportError
from nemo_prolong.export.hf_config import (
    SpecialTokens,
    configuration_files,
    load_tokenizer,
    model_config,
    special_tokens,
    write_configuration,
)
from nemo_prolong.export.source import ExportSource
from nemo_prolong.records.stage_manifest import DataRecord, StageManifest
from tests.support.export_tools import make_model
from tests.support.tiny import write_plain_tokenizer

VOCAB_SIZE = 512
BOS_ID, EOS_ID = 510, 511
ADVERTISED = 8192
TAGGED = "{%- generation -%}{{ messages[0].content }}{% endgeneration %}"
UNTAGGED = "{#- generation -#}{{ messages[0].content }}{# endgeneration #}"
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of 512 tokens, the last of which begin and end a document."""
    return write_plain_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def make_source(tokenizer: Path, tmp_path: Path) -> Callable[..., ExportSource]:
    """A function that returns a run of a model, of which nothing but its manifest exists."""

    def make(stop_token_ids: list[int] | None = None, **changes: Any) -> ExportSource:
        model = make_model(**{"num_layers": 2, "vocab_size": VOCAB_SIZE, "rotary_base": 8e6, **changes})
        manifest = StageManifest(
            name="sft",
            stage="sft",
            status="complete",
            parent=None,
            model=model,
            seq_length=1024,
            trained_context_length=4096,
            advertised_context_length=ADVERTISED,
            rotary_base=8e6,
            train_iters=4,
            step=4,
            consumed_train_rows=8,
            consumed_train_tokens=8192,
            consumed_target_tokens=8184,
            data=DataRecord(root="data", tokenizer="tokenizer", mixture=[], manifest_sha256=None),
            stop_token_ids=[EOS_ID] if stop_token_ids is None else stop_token_ids,
            versions={},
            git_commit=None,
            world_size=1,
            started_at="2026-11-24T14:00:00Z",
            finished_at=None,
            command="",
        )
        checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
        reader: Any = None
        return ExportSource(tmp_path / "run", checkpoint, 4, manifest, model, tokenizer, reader)

    return make


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_configuration_is_that_of_the_model_and_its_context(make_source: Callable[..., ExportSource]) -> None:
    source = make_source(num_query_groups=1)
    model = source.model
    special = SpecialTokens(bos_id=3, eos_id=5, pad_id=7, stop_ids=(5, 6), stop_tokens=("e", "t"))
    assert model_config(source, special, torch.bfloat16) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": 1,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": False,
        "max_position_embeddings": ADVERTISED,
        "rope_theta": 8e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
        "rope_scaling": None,
        "bos_token_id": 3,
        "eos_token_id": 5,
        "pad_token_id": 7,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "transformers_version": transformers.__version__,
    }


def test_the_scaling_of_rope_stands_where_either_version_looks(make_source: Callable[..., ExportSource]) -> None:
    source = make_source(rope_scaling=SCALING, share_embeddings_and_output_weights=True)
    special = SpecialTokens(bos_id=3, eos_id=5, pad_id=None, stop_ids=(5,), stop_tokens=("e",))
    config = model_config(source, special, torch.float32)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 8e6}
    assert (config["tie_word_embeddings"], config["pad_token_id"], config["dtype"]) == (True, None, "float32")


def test_every_file_is_made_of_run_and_tokenizer(
    make_source: Callable[..., ExportSource], tokenizer: Path, tmp_path: Path
) -> None:
    configure(tokenizer, pad_token=BOS, model_max_length=77, chat_template=TAGGED)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    (tokenizer / "added_tokens.json").write_text("{}")
    source = make_source([9, EOS_ID])
    loaded = load_tokenizer(tokenizer)
    assert special_tokens(source, loaded) == SpecialTokens(
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=BOS_ID,
        stop_ids=(9, EOS_ID),
        stop_tokens=(loaded.convert_ids_to_tokens(9), EOS),
    )
    (tmp_path / "export").mkdir()
    write_configuration(source, loaded, tmp_path / "export", torch.float32)
    written = {path.name: path for path in (tmp_path / "export").iterdir()}
    assert sorted(written) == [
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        assert written[name].read_bytes() == (tokenizer / name).read_bytes()
    assert written["chat_template.jinja"].read_text() == UNTAGGED
    assert read(written["tokenizer_config.json"]) == {
        **read(tokenizer / "tokenizer_config.json"),
        "model_max_length": ADVERTISED,
        "chat_template": UNTAGGED,
    }
    assert read(written["generation_config.json"]) == {
        "bos_token_id": BOS_ID,
        "eos_token_id": [9, EOS_ID],
        "pad_token_id": BOS_ID,
        "transformers_version": transformers.__version__,
    }
    config = read(written["config.json"])
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS_ID, EOS_ID, BOS_ID)


def test_a_tokenizer_without_padding_and_template_gets_neither(
    make_source: Callable[..., ExportSource], tokenizer: Path, tmp_path: Path
) -> None:
    configure(tokenizer, chat_template=None, pad_token=None)
    source, loaded = make_source(), load_tokenizer(tokenizer)
    (tmp_path / "export").mkdir()
    write_configuration(source, loaded, tmp_path / "export", torch.float32)
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "chat_template" not in read(tmp_path / "export" / "tokenizer_config.json")
    assert read(tmp_path / "export" / "generation_config.json") == {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID],
        "transformers_version": transformers.__version__,
    }


def test_templates_with_names_stay_in_the_configuration(
    make_source: Callable[..., ExportSource], tokenizer: Path
) -> None:
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    configure(tokenizer, chat_template=templates)
    files = configuration_files(make_source(), load_tokenizer(tokenizer), torch.float32)
    assert files["tokenizer_config.json"]["chat_template"] == templates


def test_a_tokenizer_in_the_words_of_transformers_5_is_translated(
    make_source: Callable[..., ExportSource], tokenizer: Path, tmp_path: Path
) -> None:
    configure(tokenizer, tokenizer_class="TokenizersBackend", extra_special_tokens=[EOS])
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"extra_special_tokens": [EOS]}))
    (tmp_path / "export").mkdir()
    write_configuration(make_source(), load_tokenizer(tokenizer), tmp_path / "export", torch.float32)
    config = read(tmp_path / "export" / "tokenizer_config.json")
    assert (config["tokenizer_class"], config["additional_special_tokens"]) == ("PreTrainedTokenizerFast", [EOS])
    assert read(tmp_path / "export" / "special_tokens_map.json") == {"additional_special_tokens": [EOS]}


def test_the_end_that_the_tokenizer_names_ends_a_text_too(
    make_source: Callable[..., ExportSource], tokenizer: Path
) -> None:
    assert special_tokens(make_source([0, 9]), load_tokenizer(tokenizer)).stop_ids == (0, 9, EOS_ID)


@pytest.mark.parametrize(
    ("stop_token_ids", "model", "tokens", "rule", "remedy"),
    [
        (
            [EOS_ID],
            {"vocab_size": 511},
            {},
            "it has 512 tokens, the model's vocabulary 511.",
            "Restore the tokenizer that the run was trained with.",
        ),
        (
            [EOS_ID],
            {},
            {"bos_token": None},
            "it has no bos_token.",
            "Set bos_token in {tokenizer}/tokenizer_config.json, each to a token that it has.",
        ),
        (
            [EOS_ID, 512, 600],
            {"vocab_size": 1024},
            {},
            "has no token 512, and {run}/stage.json names it as one that ends a text.",
            "Restore the tokenizer that the run was trained with.",
        ),
        (
            [-1],
            {},
            {},
            "has no token -1, and {run}/stage.json names it as one that ends a text.",
            "Restore the tokenizer that the run was trained with.",
        ),
    ],
    ids=["too many tokens", "no beginning", "an unknown end", "a negative end"],
)
def test_a_tokenizer_that_does_not_fit_the_run_is_refused(
    stop_token_ids: list[int],
    model: dict[str, Any],
    tokens: dict[str, Any],
    rule: str,
    remedy: str,
    make_source: Callable[..., ExportSource],
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    configure(tokenizer, **tokens)
    source = make_source(stop_token_ids, **model)
    with pytest.raises(ExportError) as refused:
        special_tokens(source, load_tokenizer(tokenizer))
    expected = f"tokenizer={tokenizer}: {rule} {remedy}"
    assert str(refused.value) == expected.replace("{tokenizer}", str(tokenizer)).replace("{run}", str(tmp_path / "run"))


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ExportError) as refused:
        load_tokenizer(tokenizer)
    message = str(refused.value)
    assert message.startswith(
        f"tokenizer={tokenizer}: transformers cannot load the tokenizer that the model was trained with: "
    )
    assert message.endswith(" Restore the data directory, or prepare it again with the same configuration.")
