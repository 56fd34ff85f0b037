"""An export that is there already is a success where that is asked for, and nothing is written again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_prolong.config.schema import ExportConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.run import export
from nemo_prolong.records.data_manifest import DataManifestFile
from nemo_prolong.records.export_manifest import ExportManifest, SourceRecord
from nemo_prolong.stages.manifest import new_manifest
from tests.support.tiny import tiny_config

STEP = 4


@pytest.fixture
def cfg(tmp_path: Path) -> ExportConfig:
    """An export of a complete run that is there already."""
    stage = tiny_config(tmp_path / "data", tmp_path, name="sft")
    manifest = new_manifest(stage, None, None, "python scripts/train.py", 1, DataManifestFile("", None))
    manifest.model_copy(update={"status": "complete", "step": STEP}).write(tmp_path / "sft")
    source = SourceRecord(
        run=str(tmp_path / "sft"), name="sft", stage="sft", checkpoint="step_00000004", step=STEP, git_commit=None
    )
    ExportManifest(
        source=source, dtype="float32", rotary_base=1e4, trained_context_length=64, advertised_context_length=64,
        verification=None, versions={}, exported_at="2026-11-24T14:00:00Z", files={},
    ).write(tmp_path / "hf")  # fmt: skip
    return ExportConfig(run=str(tmp_path / "sft"), output=str(tmp_path / "hf"), when_complete="succeed")


def test_an_export_that_is_there_already_succeeds_and_stays(cfg, tmp_path):
    before = os.stat(tmp_path / "hf" / "export_manifest.json")
    export(cfg)
    assert os.stat(tmp_path / "hf" / "export_manifest.json") == before
    assert f"{cfg.output} is this export already" in (tmp_path / "sft" / "export.log").read_text()


@pytest.mark.parametrize("change", [{"when_complete": "refuse"}, {"dtype": "bf16"}], ids=["not asked", "another"])
def test_an_output_that_is_another_export_is_taken(cfg, change):
    with pytest.raises(ExportError, match="it already exists"):
        export(cfg.model_copy(update=change))
