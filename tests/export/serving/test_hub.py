"""Only a verified, unchanged export is published, as a whole, and nobody sees the token."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

from nemo_prolong.config.schema import ExportTargetConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.hub import push_to_hub
from nemo_prolong.files import digest_file
from nemo_prolong.records.export_manifest import MANIFEST_FILE
from tests.support.fake_hub import fake_hub

TOKEN = "hf_" + "x" * 34
TARGET = ExportTargetConfig(push_to_hub="org/name")


@pytest.fixture
def endpoint(monkeypatch):
    """A Hub of one's own: what HF_ENDPOINT and HF_TOKEN would say, and no HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    reset_sessions()
    yield lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)
    reset_sessions()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_file_arrives_and_earlier_ones_go(exported, endpoint, caplog, capfd):
    with fake_hub(TOKEN, existing=(".gitattributes", "model.safetensors", "README.md")) as hub:
        endpoint(hub.url)
        with caplog.at_level(logging.DEBUG):
            address = push_to_hub(exported, TARGET)
        assert hub.files == contents(exported)
        assert hub.deleted == {"model.safetensors"}
        assert hub.created["name"] == "name" and hub.created["organization"] == "org" and hub.created["private"] is True
        assert address == f"{hub.url}/org/name/commit/1"
    out, err = capfd.readouterr()
    assert TOKEN not in caplog.text + out + err


def test_a_file_whose_name_is_a_pattern_arrives(exported, endpoint, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "copy")
    named = directory / "chat[1]*.jinja"
    named.write_text("{{ messages }}")
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    digest = digest_file(named)
    manifest["files"][named.name] = {"sha256": digest.sha256, "bytes": digest.num_bytes}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
    with fake_hub(TOKEN) as hub:
        endpoint(hub.url)
        push_to_hub(directory, TARGET)
        assert hub.files == contents(directory)


def test_a_public_repository_is_made_when_asked_for(exported, endpoint):
    with fake_hub(TOKEN) as hub:
        endpoint(hub.url)
        public = TARGET.model_copy(update={"hub_private": False})
        push_to_hub(exported, public)
        assert not hub.created.get("private")


def test_a_dry_run_names_every_file_and_sends_nothing(exported, endpoint, caplog):
    with fake_hub(TOKEN) as hub, caplog.at_level(logging.INFO):
        endpoint(hub.url)
        dry = TARGET.model_copy(update={"hub_dry_run": True})
        assert push_to_hub(exported, dry) is None
        assert hub.created is None and hub.files == {}
    lines = caplog.text.splitlines()
    assert "would send to org/name (made private if it does not exist):" in lines[0]
    assert {line.split()[-3] for line in lines[1:]} == contents(exported).keys()


def test_a_refused_token_is_named_as_the_cause_and_not_printed(exported, endpoint):
    with fake_hub("another token") as hub:
        endpoint(hub.url)
        with pytest.raises(ExportError) as caught:
            push_to_hub(exported, TARGET)
    assert "export.push_to_hub=org/name: the Hub did not take it: 401 Client Error" in str(caught.value)
    assert "(hf auth login), then export again with overwrite=true." in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_hub_that_does_not_answer_is_an_error_of_one_line(exported, endpoint):
    with fake_hub(TOKEN) as hub:
        endpoint(hub.url)
    with pytest.raises(ExportError, match="the Hub did not take it") as caught:
        push_to_hub(exported, TARGET)
    assert len(str(caught.value).splitlines()) == 1


def test_what_was_not_verified_or_was_changed_is_not_published(exported, tmp_path):
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"was changed after the export: config\.json\. Export again\."):
        push_to_hub(copy, TARGET)
    manifest = json.loads((copy / "export_manifest.json").read_text())
    (copy / "export_manifest.json").write_text(json.dumps({**manifest, "verification": None}))
    with pytest.raises(ExportError, match=r"was exported without verification\. Set verify=true\."):
        push_to_hub(copy, TARGET)
