"""A tokenizer directory as transformers reads it, found out without transformers.

``tokenizer.json`` decides the ids of a text. What an exported model needs beside them stands in other files: names of
tokens, added tokens, the class. Preparation, every stage and the export judge a tokenizer by the rules here, so that
what the export needs is asked for before anything is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from nemo_prolong.data.tokenizer.special_tokens import ADDITIONAL, NAMED_TOKENS, named_tokens
from nemo_prolong.errors import DataError
from nemo_prolong.files import write_json_atomically

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_MORE_TEMPLATES = "additional_chat_templates"
"""Where ``transformers`` looks for chat templates with names."""
_FAST_CLASS = "PreTrainedTokenizerFast"
_OF_THE_SAVING_MACHINE = ("backend", "is_local", "local_files_only")
"""Keys that transformers 5 saves and that say nothing about the tokenizer."""


class TokenizerProblem(NamedTuple):
    """What is wrong with a tokenizer, for the message of an error.

    Attributes:
        rule: What it is, one sentence.
        remedy: What to do.
    """

    rule: str
    remedy: str


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer directory in the words of transformers 4.

    Attributes:
        directory: The directory.
        config: Content of ``tokenizer_config.json``, translated; empty where there is none.
        special_tokens_map: The same of ``special_tokens_map.json``.
        translated: What was written in the words of transformers 5, one line a change. These words are not understood
            by transformers 4. What they were translated to is understood by both.
    """

    directory: Path
    config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    translated: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> SavedTokenizer:
        """Read a directory.

        Raises:
            DataError: If a file is no JSON object.
        """
        config, changes = _translate_config(read_object(directory / CONFIG_FILE))
        special_tokens_map, more = _translate_extra_tokens(read_object(directory / MAP_FILE), MAP_FILE)
        return cls(directory, config, special_tokens_map, (*changes, *more))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens, with those that transformers adds because another file names them.

        Raises:
            DataError: If ``tokenizer.json`` is missing or cannot be read.
        """
        path = self.directory / TOKENIZER_FILE
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(str(path), f"is no tokenizer: {error}.", "Copy the tokenizer again.") from error
        known = tokenizer.get_vocab(with_added_tokens=True)
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False) for token in self._tokens_of_other_files() if token not in known]
        )
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.vocabulary.values(), default=-1) + 1

    def named_token(self, name: str) -> str | None:
        """Return the token that is called ``name``, such as ``bos_token``, or None."""
        token = self._names.get(name)
        return token if isinstance(token, str) else None

    @cached_property
    def _names(self) -> dict[str, str | list[str]]:
        return named_tokens(self.config, self.special_tokens_map)

    def _tokens_of_other_files(self) -> Iterator[str]:
        """Yield tokens in the order in which transformers adds those that ``tokenizer.json`` does not have."""
        added = self.config.get("added_tokens_decoder")
        if added is None:
            added = {id_: token for token, id_ in read_object(self.directory / ADDED_FILE).items()}
        yield from map(_content, dict(sorted(added.items(), key=lambda item: int(item[0]))).values())
        yield from (token for token in map(self.named_token, NAMED_TOKENS) if token)
        yield from self._names.get(ADDITIONAL, ())

    def problem(self) -> TokenizerProblem | None:
        """Return why no model can be exported with the tokenizer, whatever the model, or None."""
        if "auto_map" in self.config:
            return TokenizerProblem(
                f"its {CONFIG_FILE} asks for code of its own (auto_map), and no code of a tokenizer is run here.",
                f"If {TOKENIZER_FILE} is all of it, take auto_map out and set tokenizer_class to {_FAST_CLASS}.",
            )
        return missing_names(self.named_token("bos_token"), self.named_token("eos_token"), self.directory)


def missing_names(bos_token: str | None, eos_token: str | None, directory: Path | str) -> TokenizerProblem | None:
    """Return what is wrong if a tokenizer names no beginning or no end, which ``config.json`` of an export names.

    Args:
        bos_token: Beginning of a document, or None.
        eos_token: End of a document, or None.
        directory: Of the tokenizer.
    """
    missing = [name for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is None]
    if not missing:
        return None
    return TokenizerProblem(
        f"it has no {' and no '.join(missing)}.",
        f"Set {' and '.join(missing)} in {Path(directory) / CONFIG_FILE}, each to a token that it has.",
    )


def too_many_tokens(num_tokens: int, vocab_size: int) -> str | None:
    """Return the rule that is broken if a tokenizer has tokens that a model has not, or None.

    Args:
        num_tokens: Tokens of the tokenizer, added ones included.
        vocab_size: ``model.vocab_size``; more than the tokenizer has is allowed.
    """
    if num_tokens <= vocab_size:
        return None
    return f"it has {num_tokens} tokens, the model's vocabulary {vocab_size}."


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of a tokenizer; a model directory may hold gigabytes beside them."""
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
    ]
    return files + sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))


def copy_tokenizer(saved: SavedTokenizer, target: Path) -> None:
    """Copy the files of a tokenizer into an existing directory, in the words of transformers 4."""
    for path in tokenizer_files(saved.directory):
        copy = target / path.relative_to(saved.directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    if saved.translated:
        write_json_atomically(target / CONFIG_FILE, saved.config)
        if (target / MAP_FILE).is_file():
            write_json_atomically(target / MAP_FILE, saved.special_tokens_map)


def _translate_config(stored: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    config, changes = _translate_extra_tokens(stored, CONFIG_FILE)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = _FAST_CLASS
        changes += (f"tokenizer_class of {CONFIG_FILE} (TokenizersBackend -> {_FAST_CLASS})",)
    named = config.pop("model_specific_special_tokens", None)
    if named:
        config["extra_special_tokens"] = {**(config.get("extra_special_tokens") or {}), **named}
        changes += (f"model_specific_special_tokens of {CONFIG_FILE} -> extra_special_tokens",)
    if changes:
        config = {key: value for key, value in config.items() if key not in _OF_THE_SAVING_MACHINE}
    return config, changes


def _translate_extra_tokens(stored: Mapping[str, Any], file: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Rename a list of special tokens: transformers 4 has tokens with names under the key that 5 uses for lists."""
    config = dict(stored)
    extra = config.get("extra_special_tokens")
    if not isinstance(extra, list):
        return config, ()
    del config["extra_special_tokens"]
    known = list(config.get("additional_special_tokens") or [])
    config["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return config, (f"extra_special_tokens of {file}, a list -> additional_special_tokens",)


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a tokenizer, empty where there is none.

    Raises:
        DataError: If it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(str(path), f"is no JSON: {error}.", "Copy the tokenizer again.") from error
    if not isinstance(content, dict):
        raise DataError(str(path), "is no JSON object.", "Copy the tokenizer again.")
    return content
