"""Whether Transformer Engine is here, and that nothing imports it to find out."""

from __future__ import annotations

import sys

from nemo_prolong.engine.te.backend import installed_version


def test_this_environment_has_no_transformer_engine():
    assert installed_version() is None


def test_an_installed_one_is_found_by_its_metadata_alone(tmp_path, monkeypatch):
    folder = tmp_path / "transformer_engine-2.9.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.9.0+70f53666\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed_version() == "2.9.0+70f53666"
    assert "transformer_engine" not in sys.modules
