"""What is wrong with a source is an error that names the place, or a counted drop where the user asked for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsWriter
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import DataManifest

Configure = Callable[..., PrepareConfig]
ROW_SETS = [{"path": "rows", "domain": "d", "seq_length": 16}]


def lines(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return path


@pytest.fixture
def run(mixed_config: Configure, tmp_path: Path) -> Callable[..., DataManifest]:
    def prepare_source(path: Path, seq_length: int = 16, **source: Any) -> DataManifest:
        cfg = mixed_config(
            tmp_path / "data",
            sources=[{"domain": "d", "path": str(path), **source}],
            row_sets=[{"path": "rows", "domain": "d", "seq_length": seq_length}],
            validation_fraction=0.0,
        )
        return prepare(cfg)

    return prepare_source


GOOD = {"text": "window buffer token length shard order value branch " * 5}
BAD: dict[str, tuple[bytes | dict[str, Any], str, str]] = {
    "invalid_json": (b'{"text": ', "bad.jsonl:2", "invalid_json"),
    "invalid_utf8": (b'{"text": "\xff\xfe"}', "bad.jsonl:2", "invalid_utf8"),
    "missing_field": ({"txt": "x"}, "bad.jsonl:2", "missing_field"),
    "wrong_type": ({"text": 7}, "bad.jsonl:2", "wrong_type"),
    "empty_document": ({"text": ""}, "bad.jsonl:2", "empty_document"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_refused_by_name_or_dropped(
    name: str, run: Callable[..., DataManifest], tmp_path: Path
) -> None:
    record, place, reason = BAD[name]
    path = lines(tmp_path / "bad.jsonl", GOOD, record, GOOD)
    with pytest.raises(DataError, match=place):
        run(path)
    assert not (tmp_path / "data").exists()
    [source] = run(path, on_bad_document="drop").sources
    assert source.documents == 2
    assert source.rejected[reason].documents == 1 and list(source.rejected) == [reason]
    assert source.rejected_examples[0].reason == reason


def test_a_conversation_without_an_answer_is_refused_or_dropped(
    run: Callable[..., DataManifest], tmp_path: Path
) -> None:
    question = {"role": "user", "content": "window buffer? " * 10}
    answer = {"role": "assistant", "content": "token length. " * 10}
    path = lines(tmp_path / "chat.jsonl", {"messages": [question, answer]}, {"messages": [question]})
    with pytest.raises(DataError, match=r"chat.jsonl@\d+: .*has no answer to learn from"):
        run(path, messages_field="messages")
    [source] = run(path, 128, messages_field="messages", on_bad_document="drop").sources
    assert (source.documents, list(source.rejected)) == (1, ["unusable_conversation"])


def test_tokens_beyond_the_vocabulary_are_refused_or_dropped(run: Callable[..., DataManifest], tmp_path: Path) -> None:
    with MdsWriter(tmp_path / "tokens", {"input_ids": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.full(40, 299, np.uint32)})
        writer.write({"input_ids": np.full(40, 300, np.uint32)})
    with pytest.raises(DataError, match="has token ids from 300 to 300, the tokenizer has 300 tokens"):
        run(tmp_path / "tokens", format="tokenized_mds")
    [source] = run(tmp_path / "tokens", format="tokenized_mds", on_bad_document="drop").sources
    assert (source.documents, list(source.rejected)) == (1, ["token_beyond_vocabulary"])


def test_a_missing_source_is_named(run: Callable[..., DataManifest], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        run(tmp_path / "nowhere")


def test_a_missing_tokenizer_is_named(mixed_config: Configure, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer.*nothing"):
        prepare(mixed_config(tmp_path / "data", tokenizer={"path": str(tmp_path / "nothing")}))


def changed_tokenizer(directory: Path, target: Path, **changes: Any) -> Path:
    """Copy a tokenizer with other keys in ``tokenizer_config.json``; None removes one."""
    shutil.copytree(directory, target)
    path = target / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    # Where both files name a token, transformers may read either.
    (target / "special_tokens_map.json").unlink()
    return target


def test_a_tokenizer_of_transformers_5_is_prepared_for_both(
    mixed_config: Configure, tokenizer_directory: Path, tmp_path: Path
) -> None:
    newer = changed_tokenizer(
        tokenizer_directory,
        tmp_path / "newer",
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<|reserved_special_token_0|>"],
        added_tokens_decoder=None,
    )
    manifest = prepare(mixed_config(tmp_path / "data", tokenizer={"path": str(newer)}))
    assert manifest.tokenizer_translated == [
        "extra_special_tokens of tokenizer_config.json, a list -> additional_special_tokens",
        "tokenizer_class of tokenizer_config.json (TokenizersBackend -> PreTrainedTokenizerFast)",
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    assert tokenizer.additional_special_tokens == ["<|reserved_special_token_0|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert manifest.vocab_size == len(tokenizer) == 300


def test_a_token_that_only_the_configuration_adds_counts(
    mixed_config: Configure, tokenizer_directory: Path, tmp_path: Path
) -> None:
    padded = changed_tokenizer(tokenizer_directory, tmp_path / "padded", pad_token="[PAD]")
    assert prepare(mixed_config(tmp_path / "data", tokenizer={"path": str(padded)})).vocab_size == 301


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": None}, "it has no eos_token. Set eos_token in "),
        ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "asks for code of its own (auto_map), and no code of a tok"),
        ({"tokenizer_class": "NobodysTokenizer"}, "transformers cannot load it: Tokenizer class NobodysTokenizer does"),
    ],
)
def test_a_tokenizer_that_cannot_be_exported_is_not_prepared(
    mixed_config: Configure, tokenizer_directory: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = changed_tokenizer(tokenizer_directory, tmp_path / "tokenizer", **changes)
    with pytest.raises(DataError) as error:
        prepare(mixed_config(tmp_path / "data", tokenizer={"path": str(path)}))
    assert str(error.value).startswith(f"tokenizer.path={path}: ") and message in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_tokenizer_cannot_be_trained_on_tokens(
    mixed_config: Configure, mixed_sources: list[dict[str, Any]], tmp_path: Path
) -> None:
    tokenized = [{**source, "domain": "d"} for source in mixed_sources if source["path"].endswith("tokenized")]
    cfg = mixed_config(
        tmp_path / "data", sources=tokenized, row_sets=ROW_SETS, tokenizer={"vocab_size": 300, "train_bytes": 1000}
    )
    with pytest.raises(DataError, match=r"tokenizer.path=null: .* is tokenized already"):
        prepare(cfg)
