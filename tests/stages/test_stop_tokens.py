"""What ends the texts of a model is known before a stage trains, and handed down from stage to stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.data.tokenizer.stop_tokens import end_of_turn, older_stop_ids
from nemo_prolong.errors import DataError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.stage_manifest import MANIFEST_FILE, StageManifest
from nemo_prolong.stages.manifest import continued, new_manifest
from nemo_prolong.stages.preflight import check_data, check_files
from nemo_prolong.stages.recipe_plan import check_chat
from nemo_prolong.weights.names import pieces
from tests.support.chatml import TRAINING_TEMPLATE, chat_entry, name_chat, token_ids, write_chatml_tokenizer
from tests.support.export_tools import write_tokenizer

ENDOFTEXT, IM_END = "<|endoftext|>", "<|im_end|>"
SFT: dict[str, Any] = {"stage": "sft", "transition": "weights", "data": {"apply_instruct_masks": True}}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatML tokenizer with its template, which is also that of training."""
    directory = write_chatml_tokenizer(tmp_path_factory.mktemp("chatml"))
    (directory / "chat_template.jinja").write_text(TRAINING_TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with Llama-3's special tokens and chat template."""
    directory = tmp_path_factory.mktemp("llama3")
    write_tokenizer(directory)
    return directory


@pytest.fixture
def chat_data(data_root: Path, chatml: Path) -> Path:
    """The data directory with conversations in ChatML, as far as its manifest goes."""
    return with_tokenizer(data_root, chatml, ENDOFTEXT, **chat_entry(None, chatml))


def with_tokenizer(root: Path, tokenizer: Path, eos_token: str | None, **chat: Any) -> Path:
    """Give a data directory a tokenizer, and a manifest with what a stage reads of it."""
    shutil.rmtree(root / "tokenizer")
    shutil.copytree(tokenizer, root / "tokenizer")
    sha256 = TextEncoder(tokenizer, "tokenizers").sha256
    content = {"format": 2, "tokenizer_sha256": sha256, "eos_token": eos_token}
    (root / "manifest.json").write_text(json.dumps(content))
    if chat:
        name_chat(root, **chat)
    return root


def manifest_of(cfg: RunConfig) -> StageManifest:
    """Return the manifest that the stage would begin with."""
    start = check_files(cfg, RunDirectory(cfg.run_dir))
    return new_manifest(cfg, start.parent, start.parent_record, "", 1, start.data, start.stops)


def make_parent(make_config: Callable[..., RunConfig], make_run: Callable[..., Path], **values: Any) -> Path:
    """Write a complete run whose manifest has ``values``; one that is None is left out, as by earlier versions."""
    run = make_run(make_config(name="parent"), "complete", (4,))
    manifest = {**json.loads((run / MANIFEST_FILE).read_text()), **values}
    kept = {key: value for key, value in manifest.items() if key not in values or value is not None}
    (run / MANIFEST_FILE).write_text(json.dumps(kept))
    return run


# What is handed down.


def test_documents_come_first_then_the_parent_then_turns(make_config, make_run, make_child, chat_data, chatml):
    ids = token_ids(chatml)
    parent = make_parent(make_config, make_run, stop_token_ids=[7, ids[ENDOFTEXT]])
    sft = manifest_of(make_child(parent, **SFT))
    assert sft.stop_token_ids == [ids[ENDOFTEXT], 7, ids[IM_END]]
    assert sft.parent.stop_token_ids == [7, ids[ENDOFTEXT]]
    assert sft.chat.end_of_turn_ids == [ids[IM_END]]


def test_a_stage_on_text_keeps_the_chat_format_of_its_parent(make_config, make_run, make_child, chat_data, chatml):
    chat = {**chat_entry(None, chatml), "date": "2024-07-26"}
    parent = make_parent(make_config, make_run, stop_token_ids=[505], chat=chat)
    stage = manifest_of(make_child(parent))
    assert stage.chat.date == "2024-07-26"
    assert stage.stop_token_ids == [token_ids(chatml)[ENDOFTEXT], 505]


def test_conversations_beside_the_rows_of_a_stage_are_not_its_own(make_config, chat_data, chatml):
    base = manifest_of(make_config())
    assert (base.stop_token_ids, base.chat) == ([token_ids(chatml)[ENDOFTEXT]], None)


def test_rows_that_do_not_say_how_documents_end_give_none(make_config):
    assert manifest_of(make_config()).stop_token_ids == []


def test_a_parent_of_an_earlier_version_is_read_by_the_tokenizer(make_config, make_run, make_child, data_root, llama3):
    with_tokenizer(data_root, llama3, "<|end_of_text|>")
    parent = make_parent(make_config, make_run, stop_token_ids=None, chat=None)
    assert "stop_token_ids" not in json.loads((parent / MANIFEST_FILE).read_text())
    ids = token_ids(llama3)
    assert manifest_of(make_child(parent)).stop_token_ids == [ids["<|end_of_text|>"], ids["<|eot_id|>"]]


def test_conversations_of_an_earlier_version_are_read_by_the_template(make_config, make_run, make_child, chat_data):
    ids = token_ids(chat_data / "tokenizer")
    content = json.loads((chat_data / "manifest.json").read_text())
    (chat_data / "manifest.json").write_text(json.dumps({key: content[key] for key in content if key != "chat"}))
    parent = make_parent(make_config, make_run, stop_token_ids=[7])
    sft = manifest_of(make_child(parent, **SFT))
    assert (sft.stop_token_ids, sft.chat) == ([ids[ENDOFTEXT], 7, ids[IM_END]], None)


@pytest.mark.parametrize("left", [[1, 2], None])
def test_a_run_that_goes_on_keeps_what_it_began_with(make_config, make_run, chat_data, left):
    cfg = make_config()
    before = StageManifest.read(make_run(cfg, "stopped", (2,))).model_copy(update={"stop_token_ids": left})
    start = check_files(cfg, RunDirectory(cfg.run_dir))
    manifest = new_manifest(cfg, start.run, start.parent_record, "", 1, start.data, start.stops)
    assert continued(manifest, before, 2, []).stop_token_ids == left


# Llama-3-8B-Instruct.


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """A narrow model with the vocabulary and the configuration files of Llama-3-8B-Instruct."""
    return write_instruct(tmp_path / "instruct")


SIZES = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1}
FULL_VOCAB = {**SIZES, "kv_channels": 4, "vocab_size": 128256}


def write_instruct(directory: Path) -> Path:
    directory.mkdir()
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4))]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    special += [f"<|reserved_special_token_{n}|>" for n in range(5, 251)]
    added = [
        {"id": 128000 + n, "content": token, "special": True, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for n, token in enumerate(special)
    ]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {f"t{n}": n for n in range(128000)}, "merges": []},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "bos_token_id": 128000, "eos_token_id": 128009,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    generation = {"bos_token_id": 128000, "eos_token_id": [128001, 128009], **sampling}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture
def instruct_child(make_config: Callable[..., RunConfig], instruct: Path, data_root: Path) -> RunConfig:
    """A stage that starts from the directory, on rows of its tokenizer."""
    with_tokenizer(data_root, instruct, "<|end_of_text|>")
    cfg = make_config(stage="stage1", name="child", parent=f"hf:{instruct}", transition="weights", model=FULL_VOCAB)
    shapes = [(name, shape) for p in pieces(cfg.model) for name, shape in zip(p.names, p.shapes, strict=True)]
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes}, instruct / "model.safetensors"
    )
    return cfg


def test_both_ends_of_llama_3_instruct_are_kept(instruct_child: RunConfig) -> None:
    manifest = manifest_of(instruct_child)
    assert manifest.stop_token_ids == manifest.parent.stop_token_ids == [128001, 128009]


def test_the_models_configuration_counts_where_generation_says_none(instruct_child: RunConfig, instruct: Path) -> None:
    (instruct / "generation_config.json").unlink()
    manifest = manifest_of(instruct_child)
    assert (manifest.stop_token_ids, manifest.parent.stop_token_ids) == ([128001, 128009], [128009])


# Conversations whose ends generation could not stop at.


def refusal(cfg: RunConfig) -> str:
    """Return the message that a stage is refused with, alone and as a part of a recipe."""
    with pytest.raises(DataError) as refused:
        manifest_of(cfg)
    with pytest.raises(DataError) as planned:
        check_chat(cfg, check_data(cfg))
    assert str(planned.value) == str(refused.value)
    return str(refused.value)


@pytest.fixture
def sft(make_config, make_run, make_child, chat_data) -> Callable[..., RunConfig]:
    """A function from changes of ``chat`` in the data manifest to a stage on conversations."""
    parent = make_parent(make_config, make_run, stop_token_ids=[])

    def make(**changes: Any) -> RunConfig:
        name_chat(chat_data, **{**chat_entry(None, chat_data / "tokenizer"), **changes})
        return make_child(parent, **SFT)

    return make


def test_an_end_of_a_turn_that_is_no_token_is_refused(sft, chat_data):
    message = refusal(sft(end_of_turn=["<", "|im_", "end|>"], end_of_turn_ids=[27, 91, 318]))
    assert message.startswith(
        f"tokenizer.chat_template=null: ends a turn with '<|im_end|>', and no token of {chat_data}/tokenizer stands "
        "for that: generation could not be stopped there. End what the assistant says with one token of the tokenizer"
    )


def test_an_end_of_a_turn_of_another_tokenizer_is_refused(sft, chat_data):
    assert "no token of" in refusal(sft(end_of_turn_ids=[token_ids(chat_data / "tokenizer")[ENDOFTEXT]]))


def test_the_first_token_that_stands_for_itself_ends_a_turn(sft, chat_data):
    ids = token_ids(chat_data / "tokenizer")
    cfg = sft(end_of_turn=["\n", IM_END, "\n"], end_of_turn_ids=[10, ids[IM_END], 10])
    assert manifest_of(cfg).stop_token_ids == [ids[ENDOFTEXT], ids[IM_END]]


def test_a_tokenizer_without_a_template_is_refused_for_conversations(sft, chat_data):
    cfg = sft()
    (chat_data / "tokenizer" / "chat_template.jinja").unlink()
    assert "has no chat template, so the model would be served without the format that it is trained with" in refusal(
        cfg
    )


def test_a_template_that_ends_turns_otherwise_is_refused(sft, chat_data):
    cfg = sft()
    (chat_data / "tokenizer" / "chat_template.jinja").write_text(TRAINING_TEMPLATE.replace(IM_END, ENDOFTEXT))
    message = refusal(cfg)
    assert "its chat template ends a turn with '<|endoftext|>\\n'" in message
    assert "the conversations of the data end with '<|im_end|>': the model would not stop" in message


def test_a_template_that_refuses_a_question_is_refused(sft, chat_data):
    cfg = sft()
    (chat_data / "tokenizer" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "its chat template refuses a question and an answer: no." in refusal(cfg)


def test_a_chat_entry_that_is_none_is_refused(make_config, make_run, make_child, chat_data):
    name_chat(chat_data, template=None)
    message = refusal(make_child(make_parent(make_config, make_run, stop_token_ids=[]), **SFT))
    assert message.startswith(f"{chat_data}/manifest.json: its entry chat cannot be read: Field required.")


# Templates.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in x %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}", "</s>"),
        (
            "{% for m in x %}[{{ m.role }}]{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}",
            "</s>[user]",
        ),
        ("{% for m in x %}[{{ m.role }}]{{ m.content }} </s>\n{% endfor %}{# end #}\n\n", " </s>\n"),
    ],
)
def test_the_end_of_a_turn_is_what_follows_an_answer(source: str, expected: str) -> None:
    import jinja2

    template = jinja2.Environment(autoescape=False).from_string(source)
    assert end_of_turn(lambda messages: template.render(x=messages)).rstrip("\n") == expected.rstrip("\n")


def test_a_tokenizer_without_a_template_ends_turns_as_llama_does(llama3: Path, tmp_path: Path) -> None:
    ids = token_ids(llama3)
    shutil.copytree(llama3, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    for directory in (llama3, tmp_path / "plain"):
        found = older_stop_ids(TextEncoder(directory, "tokenizers"))
        assert found == [ids["<|end_of_text|>"], ids["<|eot_id|>"]]


def test_a_tokenizer_of_another_family_ends_documents_alone(chatml: Path, tmp_path: Path) -> None:
    ids = token_ids(chatml)
    shutil.copytree(chatml, tmp_path / "plain")
    assert older_stop_ids(TextEncoder(chatml, "tokenizers")) == [ids[ENDOFTEXT], ids[IM_END]]
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    assert older_stop_ids(TextEncoder(tmp_path / "plain", "tokenizers")) == [ids[ENDOFTEXT]]
