"""``manifest.json`` as training reads it, and what the writer may put into it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nemo_prolong.errors import DataError
from nemo_prolong.records.data_manifest import DataManifestFile, MaskedPart, Sample, SampleBoundary, Samples

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
    assert DataManifestFile.read("s3://bucket/data", store.__getitem__).content == CONTENT


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
