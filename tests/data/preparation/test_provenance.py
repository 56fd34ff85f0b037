"""Rows that are packed again name the tokenizer that made them, whatever the new configuration says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.preparation.run import prepare
from nemo_prolong.data.row_origins import row_origins
from nemo_prolong.data.tokenizer import TextEncoder
from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import ChatFormat, DataManifest
from nemo_prolong.records.row_origin import ORIGIN, RowOrigin

Configure = Callable[..., PrepareConfig]
Repack = Callable[..., DataManifest]
CHAT = ChatFormat(template=None, template_sha256="ab", end_of_turn=["<|eot_id|>"], end_of_turn_ids=[9])


@pytest.fixture
def other_tokenizer(tokenizer_directory: Path, tmp_path: Path) -> Path:
    """A tokenizer of equal size in which two tokens have changed places."""
    directory = Path(shutil.copytree(tokenizer_directory, tmp_path / "other"))
    definition = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    vocab = definition["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (directory / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    return directory


@pytest.fixture
def repack(mixed_config: Configure, tmp_path: Path) -> Repack:
    """A function that packs row sets again, into rows of 64 tokens."""

    def make(*paths: Path, **changes: Any) -> DataManifest:
        settings: dict[str, Any] = {
            "sources": [{"domain": "d", "path": str(path), "format": "packed_mds"} for path in paths],
            "row_sets": [{"path": "rows", "domain": "d", "seq_length": 64, "packing": "concat"}],
            "validation_fraction": 0.0,
        }
        return prepare(mixed_config(tmp_path / "again", **{**settings, **changes}))

    return make


def moved(row_set: Path, to: Path) -> Path:
    """Return a copy of a row set alone, without the manifest of its data directory."""
    return Path(shutil.copytree(row_set, to))


def test_every_row_set_says_which_tokenizer_made_it(prepared: Path, tokenizer_directory: Path):
    manifest = DataManifest.model_validate(json.loads((prepared / "manifest.json").read_text("utf-8")))
    for path in manifest.row_sets:
        ((where, origin),) = row_origins(prepared / path).items()
        assert where == str(prepared / path / ORIGIN)
        assert origin.tokenizer_sha256 == TextEncoder(tokenizer_directory).sha256 == manifest.tokenizer_sha256
        assert (origin.tokenizer, origin.vocab_size) == (str(tokenizer_directory), manifest.vocab_size)
        assert (origin.bos_token, origin.eos_token) == (manifest.bos_token, manifest.eos_token)


@pytest.mark.parametrize("alone", [False, True], ids=["in its data directory", "moved alone"])
def test_rows_of_another_tokenizer_of_equal_size_are_refused(
    prepared: Path, repack: Repack, other_tokenizer: Path, tokenizer_directory: Path, tmp_path: Path, alone: bool
):
    row_set = moved(prepared / "web-128", tmp_path / "web") if alone else prepared / "web-128"
    with pytest.raises(DataError) as caught:
        repack(row_set, tokenizer={"path": str(other_tokenizer)})
    message = str(caught.value)
    assert message.startswith(f"path={row_set}: the rows were made with {tokenizer_directory} of ")
    assert f"and not with {other_tokenizer} (" in message and f"as {row_set / ORIGIN} says" in message
    assert f"Set tokenizer.path to the tokenizer of these rows, {tokenizer_directory}." in message
    assert not (tmp_path / "again").exists()


def test_a_row_set_without_its_file_is_judged_by_the_manifest_above(
    prepared: Path, repack: Repack, other_tokenizer: Path, tmp_path: Path
):
    data = Path(shutil.copytree(prepared, tmp_path / "data"))
    (data / "web-128" / ORIGIN).unlink()
    with pytest.raises(DataError, match=rf"as {data}/manifest\.json says, and not with {other_tokenizer}"):
        repack(data / "web-128", tokenizer={"path": str(other_tokenizer)})
    stranger = moved(data / "web-128", data / "stranger")
    assert row_origins(stranger) == {}, "the manifest says nothing of it"
    assert repack(stranger, tokenizer={"path": str(other_tokenizer)}).row_sets["rows"].rows > 0


def test_a_foreign_manifest_above_published_rows_says_nothing(prepared: Path, tmp_path: Path):
    rows = moved(prepared / "web-128", tmp_path / "hub" / "web")
    (rows / ORIGIN).unlink()
    (tmp_path / "hub" / "manifest.json").write_text('{"files": []}')
    assert row_origins(rows) == {}


def test_the_same_tokenizer_packs_rows_again_and_is_named(prepared: Path, repack: Repack, tmp_path: Path):
    manifest = repack(prepared / "web-128", prepared / "books-64-in-256")
    before = json.loads((prepared / "manifest.json").read_text("utf-8"))
    assert manifest.tokenizer_sha256 == before["tokenizer_sha256"]
    assert (manifest.bos_token, manifest.eos_token) == (before["bos_token"], before["eos_token"])
    assert len(MdsReader(tmp_path / "again" / "rows")) == manifest.row_sets["rows"].rows


def test_a_data_directory_is_no_source_of_packed_rows(prepared: Path, repack: Repack):
    with pytest.raises(DataError, match=r"is a data directory; its row sets are books-256, .* Name one of them"):
        repack(prepared)


def rewritten(row_set: Path, **changes: Any) -> Path:
    """Change what a row set says of its origin."""
    origin = RowOrigin.parse((row_set / ORIGIN).read_bytes(), "origin")
    origin.model_copy(update=changes).write(row_set)
    return row_set


def test_chat_rows_packed_again_keep_how_they_were_written(prepared: Path, repack: Repack, tmp_path: Path):
    chat = rewritten(moved(prepared / "chat-256", tmp_path / "chat"), chat=CHAT)
    manifest = repack(chat)
    assert manifest.chat == CHAT
    (origin,) = row_origins(tmp_path / "again" / "rows").values()
    assert origin.chat == CHAT


def test_conversations_of_two_templates_are_refused(prepared: Path, repack: Repack, tmp_path: Path):
    first = rewritten(moved(prepared / "chat-256", tmp_path / "first"), chat=CHAT)
    other = CHAT.model_copy(update={"template_sha256": "cd", "end_of_turn": ["<|im_end|>"], "end_of_turn_ids": [4]})
    second = rewritten(moved(prepared / "chat-256", tmp_path / "second"), chat=other)
    with pytest.raises(DataError, match=r"ends with '<\|im_end\|>' there and with '<\|eot_id\|>' elsewhere"):
        repack(first, second)


def test_the_manifest_of_packed_rows_names_their_own_ends(prepared: Path, repack: Repack, tmp_path: Path):
    rows = rewritten(moved(prepared / "web-128", tmp_path / "rows"), bos_token=None, eos_token="<|eot_id|>")
    manifest = repack(rows)
    assert (manifest.bos_token, manifest.eos_token) == (None, "<|eot_id|>")
    (origin,) = row_origins(tmp_path / "again" / "rows").values()
    assert (origin.bos_token, origin.eos_token) == (None, "<|eot_id|>")


def test_documents_of_two_different_ends_are_refused(
    prepared: Path, repack: Repack, mixed_sources: list[dict[str, Any]], tmp_path: Path
):
    rows = rewritten(moved(prepared / "web-128", tmp_path / "rows"), eos_token="<|eot_id|>")
    text = tmp_path / "more.jsonl"
    text.write_text(json.dumps({"text": "window buffer token " * 50}) + "\n")
    sources = [
        {"domain": "d", "path": str(rows), "format": "packed_mds"},
        {"domain": "d", "path": str(text), "format": "jsonl"},
    ]
    with pytest.raises(DataError, match=r"between <\|begin_of_text\|> and <\|eot_id\|>, as .* and those of other"):
        repack(sources=sources)


def test_a_damaged_origin_is_refused_by_name(prepared: Path, repack: Repack, tmp_path: Path):
    rows = moved(prepared / "web-128", tmp_path / "rows")
    (rows / ORIGIN).write_text("{}")
    with pytest.raises(DataError, match=r"rows/origin\.json: does not say where the rows come from"):
        repack(rows)
