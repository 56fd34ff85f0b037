"""scripts/chat.py answers with the tokens that transformers generates, and refuses what does not fit."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tokenizers import KINDS

SCRIPT = Path(__file__).parents[3] / "scripts" / "chat.py"


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run the script; return what it printed. Typed lines come from ``typed``."""

    def run(*arguments: object, typed: tuple[str, ...] = ()) -> str:
        lines = iter(typed)

        def read(prompt: str = "") -> str:
            for line in lines:
                return line
            raise EOFError

        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
        monkeypatch.setattr("builtins.input", read)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def expected(directory: Path, content: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    turns = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_question_is_answered_with_the_greedy_tokens(exported, chat):
    printed = chat(exported, "--max-new-tokens", 12, "--ask", "number 12345")
    assert printed.strip() == expected(exported, "number 12345").strip() != ""


def test_a_file_comes_first_and_stays_after_clear(exported, chat, tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("A document about the number 12345.")
    typed = ("what", "", "/clear", "what")
    printed = chat(exported, "--max-new-tokens", 12, "--file", file, typed=typed)
    answer = expected(exported, f"{file.read_text()}\n\nwhat")
    assert printed.split() == (answer + "\n" + answer).split()
    assert answer.split() != expected(exported, "what").split()


def test_a_prompt_beyond_the_advertised_length_is_refused_early(exported, chat):
    with pytest.raises(SystemExit) as caught:
        chat(exported, "--max-new-tokens", 2**19, "--ask", "number")
    message = str(caught.value.code)
    assert "the answer may have 524288: more than the 524288 the model is made for. Shorten the file" in message


def test_fp8_that_transformers_would_ignore_is_refused(fp8, chat):
    with pytest.raises(SystemExit, match="transformers does not read FP8 weights"):
        chat(fp8, "--ask", "number")


def test_neither_binary_files_nor_engine_checkpoints_are_taken(exported, engine, chat, capsys, tmp_path):
    file = tmp_path / "image.bin"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    for arguments, message in (
        ((exported, "--file", file), f"{file} cannot be read as text in UTF-8: "),
        ((engine,), f"{engine} holds the checkpoint of an engine, which transformers does not read"),
    ):
        with pytest.raises(SystemExit) as caught:
            chat(*arguments)
        assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "no/such is no exported directory: it has no config.json"),
        (["{}", "--file", "no.txt"], "no.txt does not exist"),
        (["{}", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_what_is_not_there_is_said(exported, chat, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        chat(*(argument.format(exported) for argument in arguments))
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_text_for_a_base_model_does_not_end_with_the_end_token(tmp_path):
    tokenizer = KINDS["wordpiece"](tmp_path)
    tokenizer.eos_token = "[SEP]"
    assert tokenizer("of keys")["input_ids"][-1] == tokenizer.eos_token_id
    make_prompt = runpy.run_path(str(SCRIPT))["make_prompt"]
    prompt = make_prompt(tokenizer, [{"role": "user", "content": "of keys"}, {"role": "assistant", "content": "and"}])
    ids = prompt["input_ids"][0].tolist()
    assert ids == [tokenizer.cls_token_id, *tokenizer("of keys\nand", add_special_tokens=False)["input_ids"]]
    assert prompt["attention_mask"].shape == prompt["input_ids"].shape
    assert prompt.to("cpu")["input_ids"].shape == (1, len(ids))
