"""``manifest.json`` as training reads it, and what the writer may put into it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import (
    ChatFormat,
    DataManifestFile,
    MaskedPart,
    Sample,
    SampleBoundary,
    Samples,
    read_for_card,
)

CONTENT = b'{"format": 2, "tokenizer_sha256": "70"}'


def no_store(where: str) -> bytes:
    raise AssertionError(f"asked the store for {where}")


def empty_store(where: str) -> bytes:
    raise DataError(where, "is missing.", "Check the path.")


def test_the_manifest_of_a_directory_has_a_hash_and_names_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(CONTENT)
    found = DataManifestFile.read(str(tmp_path), no_store)
    assert (found.sha256, found.tokenizer_sha256) == (hashlib.sha256(CONTENT).hexdigest(), "70")


def test_the_manifest_of_an_address_comes_from_its_store() -> None:
    store = {"s3://bucket/data/manifest.json": CONTENT}
    for root in ("s3://bucket/data", "s3://bucket/data/"):
        assert DataManifestFile.read(root, store.__getitem__).content == CONTENT
    # A bucket's letters are not taken for a slash.
    assert DataManifestFile.read("s3://TAX/", {"s3://TAX/manifest.json": CONTENT}.__getitem__).content == CONTENT


def manifest_of(**values: Any) -> DataManifestFile:
    return DataManifestFile("data/manifest.json", json.dumps(values).encode())


def test_the_token_that_ends_documents_is_named_where_there_is_one() -> None:
    assert manifest_of(eos_token="</s>").eos_token == "</s>"
    assert manifest_of(eos_token=None).eos_token is manifest_of().eos_token is None


def test_the_format_of_conversations_is_read() -> None:
    chat = ChatFormat(template=None, template_sha256="00", end_of_turn=["<e>"], end_of_turn_ids=[5])
    assert manifest_of(chat=chat.model_dump()).chat == chat
    assert manifest_of(chat=None).chat is manifest_of().chat is None


def test_a_format_of_conversations_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        _ = manifest_of(chat={"template": 5}).chat
    assert str(caught.value) == (
        "data/manifest.json: its entry chat cannot be read: Input should be a valid string. "
        "Copy or prepare the data again."
    )


def test_targets_of_a_row_set_are_those_counted() -> None:
    counted = manifest_of(row_sets={"chat": {"target_tokens": 7}, "text": {"target_tokens": None}, "odd": []})
    assert counted.target_tokens("chat") == 7
    assert [counted.target_tokens(path) for path in ("text", "odd", "absent")] == [None] * 3
    assert manifest_of(row_sets=[]).target_tokens("chat") is manifest_of().target_tokens("chat") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "{path}: cannot be read (Expecting value: line 1 column 2 (char 1)). Prepare the data again."),
        (
            '{"row_sets": {"rows": [{"row": "x"}]}}',
            "{path}: row_sets.rows.0.row: no data card can be made of it: Input should be a valid integer, "
            "unable to parse string as an integer. Prepare the data again.",
        ),
    ],
)
def test_a_file_of_which_no_card_can_be_made_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_for_card(path, Samples)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize("root", ["s3://bucket/published", "directory"])
def test_a_published_directory_has_no_manifest(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = DataManifestFile.read(root, empty_store)
    assert (found.content, found.sha256, found.tokenizer_sha256) == (None, None, None)


@pytest.mark.parametrize(("content", "message"), [("{", r"is no JSON \("), ("[]", "is no JSON object")])
def test_a_damaged_manifest_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=rf"manifest.json: {message}.* Copy or prepare the data again"):
        _ = DataManifestFile.read(str(tmp_path), no_store).tokenizer_sha256


def test_half_surrogates_are_written_as_they_are(tmp_path: Path) -> None:
    sample = Sample(
        row=0,
        domain="\ud800",
        tokens=3,
        spans=[(0, 3)],
        boundaries=[SampleBoundary(position=0, before="", after="\x1b")],
        masked_text=[MaskedPart(text="a", target=True)],
    )
    Samples(row_sets={"rows": [sample]}).write(tmp_path / "samples.json")
    (written,) = json.loads((tmp_path / "samples.json").read_text())["row_sets"]["rows"]
    assert (written["domain"], written["spans"], written["boundaries"][0]["after"]) == ("\ud800", [[0, 3]], "\x1b")
    assert list(written) == ["row", "domain", "tokens", "spans", "boundaries", "masked_text"]
