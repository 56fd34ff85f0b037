"""What the engine finds to run on, as the rules of the configuration want it."""

from __future__ import annotations

import sys

import pytest
import torch

from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.engine import platform


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cpu_has_no_transformer_engine_and_no_device():
    assert platform.current_platform() == Platform()


def test_versions_and_device_of_a_gpu_become_releases(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    releases = {"transformer-engine": "2.9.0+70f53666", "flash-attn": "2.7.4.post1"}
    monkeypatch.setattr(platform, "_installed", releases.get)
    assert platform.current_platform() == Platform(
        (2, 9, 0), (9, 0), cudnn=(9, 10, 2), cuda=(13, 0), flash_attn=(2, 7, 4), flash_attn_3=None
    )


def test_this_environment_has_no_transformer_engine():
    assert platform.transformer_engine_version() is None


def test_an_installed_transformer_engine_is_found_by_its_metadata_alone(tmp_path, monkeypatch):
    folder = tmp_path / "transformer_engine-2.9.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.9.0+70f53666\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert platform.transformer_engine_version() == "2.9.0+70f53666"
    assert "transformer_engine" not in sys.modules
