"""What transformers makes of a tokenizer directory is known without transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.data.tokenizer import BOS, EOS
from nemo_prolong.data.tokenizer.loading import load_tokenizer, loading_problem
from nemo_prolong.data.tokenizer.saved import SavedTokenizer, copy_tokenizer
from nemo_prolong.errors import DataError
from tests.support.tiny import write_plain_tokenizer

NEWER = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
PAD = {"content": "[PAD]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of 512 tokens."""
    return write_plain_tokenizer(tmp_path / "tokenizer")


def configure(directory: Path, **changes: Any) -> Path:
    """Change keys of ``tokenizer_config.json``; None removes one."""
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return directory


def names_elsewhere(directory: Path) -> None:
    configure(directory, bos_token=None, eos_token=None)
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": {**PAD, "content": EOS}})
    )


def map_that_is_not_read(directory: Path) -> None:
    # transformers ignores the map where the configuration lists the added tokens.
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": BOS, "pad_token": "<never>"}))
    configure(directory, added_tokens_decoder={"510": {**PAD, "content": BOS}, "511": {**PAD, "content": EOS}})


def added_beside(directory: Path) -> None:
    (directory / "added_tokens.json").write_text(json.dumps({"<think>": 513, "<call>": 512}))


DIRECTORIES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "as it is": (lambda d: None, 512),
    "a padding token that only its name adds": (lambda d: configure(d, pad_token="[PAD]"), 513),
    "a padding token among the added ones": (lambda d: configure(d, added_tokens_decoder={"512": PAD}), 513),
    "a named token that exists": (
        lambda d: configure(d, pad_token=EOS, unk_token={**PAD, "__type": "AddedToken", "content": BOS}),
        512,
    ),
    "additional special tokens": (lambda d: configure(d, additional_special_tokens=["<a>", "<b>", BOS]), 514),
    "names in the other file": (names_elsewhere, 512),
    "a map that is not read": (map_that_is_not_read, 512),
    "added tokens in the older file": (added_beside, 514),
    "transformers 5": (lambda d: configure(d, **NEWER, extra_special_tokens=["<a>", EOS]), 513),
    "tokens with names, transformers 5": (
        lambda d: configure(d, **NEWER, model_specific_special_tokens={"eot_token": EOS}),
        512,
    ),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_vocabulary_and_names_are_those_of_transformers(tokenizer: Path, kind: str) -> None:
    change, vocab_size = DIRECTORIES[kind]
    change(tokenizer)
    saved, loaded = SavedTokenizer.read(tokenizer), load_tokenizer(tokenizer)
    assert saved.vocab_size == len(loaded) == vocab_size
    assert saved.vocabulary.keys() == loaded.get_vocab().keys()
    named = {name: saved.named_token(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    assert named == {name: getattr(loaded, f"{name}_token") for name in named}
    assert saved.problem() is None and loading_problem(tokenizer) is None
    assert loaded.name_or_path == str(tokenizer)


def test_a_tokenizer_of_transformers_5_is_translated_in_the_copy(tokenizer: Path, tmp_path: Path) -> None:
    configure(tokenizer, **NEWER, extra_special_tokens=[EOS], additional_special_tokens=[BOS], model_max_length=8192)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"extra_special_tokens": [EOS]}))
    saved = SavedTokenizer.read(tokenizer)
    assert saved.translated == (
        "extra_special_tokens of tokenizer_config.json, a list -> additional_special_tokens",
        "tokenizer_class of tokenizer_config.json (TokenizersBackend -> PreTrainedTokenizerFast)",
        "extra_special_tokens of special_tokens_map.json, a list -> additional_special_tokens",
    )
    (tmp_path / "copy").mkdir()
    copy_tokenizer(saved, tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [BOS, EOS],
        "model_max_length": 8192,
    }
    assert json.loads((tmp_path / "copy" / "special_tokens_map.json").read_text()) == {
        "additional_special_tokens": [EOS]
    }
    copied = SavedTokenizer.read(tmp_path / "copy")
    assert (copied.translated, copied.vocabulary) == ((), saved.vocabulary)


def test_a_tokenizer_that_needs_no_translation_is_copied_bit_by_bit(tokenizer: Path, tmp_path: Path) -> None:
    (tokenizer / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(SavedTokenizer.read(tokenizer), tmp_path / "copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copied == {name: (tokenizer / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


@pytest.mark.parametrize(
    ("changes", "rule", "remedy"),
    [
        ({"bos_token": None}, "it has no bos_token.", "Set bos_token in {}, each to a token that it has."),
        (
            {"bos_token": None, "eos_token": None},
            "it has no bos_token and no eos_token.",
            "Set bos_token and eos_token in {}, each to a token that it has.",
        ),
        (
            {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
            "its tokenizer_config.json asks for code of its own (auto_map), and no code of a tokenizer is run here.",
            "If tokenizer.json is all of it, take auto_map out and set tokenizer_class to PreTrainedTokenizerFast.",
        ),
    ],
)
def test_what_no_model_could_be_exported_with_is_named(
    tokenizer: Path, changes: dict[str, Any], rule: str, remedy: str
) -> None:
    problem = SavedTokenizer.read(configure(tokenizer, **changes)).problem()
    assert problem == (rule, remedy.format(tokenizer / "tokenizer_config.json"))


def test_a_class_that_transformers_does_not_know_is_named(tokenizer: Path) -> None:
    problem = loading_problem(configure(tokenizer, tokenizer_class="MistralCommonBackend"))
    assert problem is not None
    assert problem.rule.startswith("transformers cannot load it: Tokenizer class MistralCommonBackend does not exist")


def test_files_that_are_no_json_object_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    (tokenizer / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: is no JSON object\. Copy the tokenizer again\."):
        SavedTokenizer.read(tokenizer)
    shutil.rmtree(tokenizer)
    with pytest.raises(DataError, match=r"tokenizer\.json: is no tokenizer: "):
        _ = SavedTokenizer.read(tokenizer).vocabulary
