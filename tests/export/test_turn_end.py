"""A model that learned conversations in ChatML is served in ChatML, and its answers end where a turn ends."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import ExportError
from nemo_prolong.export.run import export
from nemo_prolong.records.checkpoint.verify import newest_checkpoint
from nemo_prolong.records.stage_manifest import StageManifest
from nemo_prolong.stages.run import run_stage
from tests.support.chatml import (
    TRAINING_TEMPLATE,
    chat_data_config,
    token_ids,
    write_chatml_tokenizer,
    write_talks,
)
from tests.support.export_tools import export_config
from tests.support.fake_checkpoint import seal
from tests.support.tiny import tiny_config, write_data

SCRIPTS = Path(__file__).parents[2] / "scripts"
TALK = [{"role": "user", "content": "add 1 and 1"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage from scratch on text, and one on conversations in ChatML after it."""
    root = tmp_path_factory.mktemp("chatml")
    tokenizer = write_chatml_tokenizer(root / "chatml")
    template = root / "train.jinja"
    template.write_text(TRAINING_TEMPLATE)
    write_data(root / "text")
    shutil.rmtree(root / "text" / "tokenizer")
    shutil.copytree(tokenizer, root / "text" / "tokenizer")
    prepare(chat_data_config(root / "chat", tokenizer, template, write_talks(root / "talks.jsonl")))
    run_stage(tiny_config(root / "text", root, name="base", train={"train_iters": 2}), [])
    sft = {"stage": "sft", "parent": str(root / "base"), "transition": "weights", "train": {"train_iters": 2}}
    run_stage(tiny_config(root / "chat", root, name="sft", data={"apply_instruct_masks": True}, **sft), [])
    return root


@pytest.fixture(scope="module")
def exported(root: Path) -> Path:
    """The verified export of the stage on conversations."""
    export(export_config(root / "sft", root / "exported"))
    return root / "exported"


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Callable[[], tuple[Path, Path]]:
    """A function that copies the run and its tokenizer; the copy of the run names that of the tokenizer."""

    def copy() -> tuple[Path, Path]:
        run, tokenizer = tmp_path / "sft", tmp_path / "tokenizer"
        shutil.copytree(root / "sft", run)
        shutil.copytree(root / "chat" / "tokenizer", tokenizer)
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None
        edit(checkpoint / "model.json", tokenizer=str(tokenizer))
        seal(checkpoint, 2)
        return run, tokenizer

    return copy


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(run: Path, output: Path) -> str:
    with pytest.raises(ExportError) as refused:
        export(export_config(run, output, verify=False))
    assert not output.exists()
    return str(refused.value)


def test_the_run_says_what_ends_its_texts(root: Path) -> None:
    ids = token_ids(root / "chatml")
    sft = StageManifest.read(root / "sft")
    assert sft.stop_token_ids == [ids["<|endoftext|>"], ids["<|im_end|>"]]
    assert sft.chat is not None and sft.chat.end_of_turn == ["<|im_end|>"]
    base = StageManifest.read(root / "base")
    assert (base.stop_token_ids, base.chat) == ([], None)


def test_generation_ends_at_the_end_of_a_turn_of_chatml(root: Path, exported: Path) -> None:
    ids = token_ids(root / "chatml")
    stops = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    assert GenerationConfig.from_pretrained(exported).eos_token_id == stops
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == ids["<|endoftext|>"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = iter([5, ids["<|im_end|>"], 6, 7])
    output = model.generate(**prompt, max_new_tokens=4, prefix_allowed_tokens_fn=lambda batch, so_far: [next(written)])
    assert output[0, prompt["input_ids"].shape[1] :].tolist() == [5, ids["<|im_end|>"]]


def test_the_template_of_training_is_served_without_its_tags(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nadd 1 and 1<|im_end|>\n<|im_start|>assistant\n"
    in_config = json.loads((exported / "tokenizer_config.json").read_text())["chat_template"]
    assert in_config == (exported / "chat_template.jinja").read_text()
    assert "generation %}" not in in_config


def test_card_and_manifest_name_the_tokens_that_end_a_text(root: Path, exported: Path) -> None:
    ids = token_ids(root / "chatml")
    card = (exported / "README.md").read_text()
    stops = f"`<|endoftext|>` ({ids['<|endoftext|>']}), `<|im_end|>` ({ids['<|im_end|>']})"
    assert f"Generation ends at {stops}." in card
    assert "An answer ends with `<|im_end|>`." in card and "date of today" not in card
    manifest = json.loads((exported / "export_manifest.json").read_text())
    assert manifest["stop_token_ids"] == manifest["verification"]["stop_ids"]
    digest = hashlib.sha256((exported / "chat_template.jinja").read_bytes()).hexdigest()
    assert (manifest["chat_template_sha256"], manifest["chat_date"]) == (digest, None)


def test_the_date_of_training_is_named(root: Path, damaged: Callable[[], tuple[Path, Path]], tmp_path: Path) -> None:
    run, _ = damaged()
    chat = json.loads((run / "stage.json").read_text())["chat"]
    edit(run / "stage.json", chat={**chat, "date": "2024-07-26"})
    export(export_config(run, tmp_path / "hf", verify=False))
    assert "training gave it `2024-07-26`" in (tmp_path / "hf" / "README.md").read_text()
    assert json.loads((tmp_path / "hf" / "export_manifest.json").read_text())["chat_date"] == "2024-07-26"


def test_a_base_model_is_exported_without_a_template(root: Path, tmp_path: Path) -> None:
    export(export_config(root / "base", tmp_path / "hf", verify=False))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is None
    # Its rows do not say how documents end, and its tokenizer has none of Llama-3's tokens.
    ids = token_ids(root / "chatml")
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [ids["<|endoftext|>"]]
    assert "trained on conversations" not in (tmp_path / "hf" / "README.md").read_text()


def test_a_template_that_ends_turns_otherwise_is_refused(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path
) -> None:
    run, tokenizer = damaged()
    template = (tokenizer / "chat_template.jinja").read_text()
    (tokenizer / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_start|>"))
    message = refusal(run, tmp_path / "hf")
    assert "its chat template ends an answer with '<|im_start|>\\n', and generation ends at" in message
    assert "an answer would go on into the next turn" in message


def test_a_lost_template_is_refused_after_conversations(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path
) -> None:
    run, tokenizer = damaged()
    (tokenizer / "chat_template.jinja").unlink()
    assert "it has no chat template" in refusal(run, tmp_path / "hf")


def test_a_template_that_refuses_a_question_is_refused(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path
) -> None:
    run, tokenizer = damaged()
    (tokenizer / "chat_template.jinja").write_text("{{ raise_exception('no questions') }}")
    assert "its chat template refuses a question and an answer: no questions" in refusal(run, tmp_path / "hf")


@pytest.mark.parametrize(("number", "rule"), [(512, "token 512, and the model has 512 tokens"), (510, "here that is")])
def test_an_end_of_a_turn_that_is_another_token_is_refused(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path, number: int, rule: str
) -> None:
    run, _ = damaged()
    chat = json.loads((run / "stage.json").read_text())["chat"]
    edit(run / "stage.json", chat={**chat, "end_of_turn_ids": [number]})
    assert rule in refusal(run, tmp_path / "hf")


def test_another_tokenizer_in_the_place_of_the_runs_is_refused(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path
) -> None:
    run, tokenizer = damaged()
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|in_end|>"))
    message = refusal(run, tmp_path / "hf")
    assert f"{tokenizer} holds another tokenizer (SHA-256 " in message


def test_a_run_that_does_not_say_it_is_read_by_its_template(
    damaged: Callable[[], tuple[Path, Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, tokenizer = damaged()
    manifest = json.loads((run / "stage.json").read_text())
    older = {key: value for key, value in manifest.items() if key not in ("stop_token_ids", "chat")}
    (run / "stage.json").write_text(json.dumps(older))
    export(export_config(run, tmp_path / "hf", verify=False))
    ids = token_ids(tokenizer)
    stops = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == stops
    assert "stage.json does not say what ends the texts of the model" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("script", ["ask", "chat"])
def test_the_scripts_print_no_token_that_ends_an_answer(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
) -> None:
    # As in tokenizers whose <|im_end|> is an added token and no special one.
    directory = tmp_path / "hf"
    shutil.copytree(exported, directory)
    definition = json.loads((directory / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    end = token_ids(directory)["<|im_end|>"]
    written = iter([5, end, 6, 7])

    def forced(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs["prefix_allowed_tokens_fn"] = lambda batch, so_far: [next(written)]
        return generate(*args, **kwargs)

    generate = type(AutoModelForCausalLM.from_pretrained(directory)).generate
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", forced)
    question = ["add"] if script == "ask" else ["--ask", "add", "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(directory), *question])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert capsys.readouterr().out.strip() == tokenizer.decode([5]).strip() != ""
