"""Exports for servers, one of each kind, of the runs that the tests of the export share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import ModelConfig
from tests.support.export_tools import Workspace, export_config
from tests.support.serving_tools import target_config


@pytest.fixture(scope="session")
def llama3_8b() -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CONFIG_DIR / "model" / "llama3_8b_instruct.yaml").read_text()))


@pytest.fixture(scope="session")
def bf16(workspace: Workspace) -> Path:
    """The verified bf16 directory of ``child``."""
    from nemo_prolong.export.run import export

    export(export_config(workspace.child, workspace.root / "bf16", dtype="bf16"))
    return workspace.root / "bf16"


@pytest.fixture(scope="session")
def fp8(workspace: Workspace) -> Path:
    """``export=trtllm`` of ``child``."""
    from nemo_prolong.export.run import export

    export(target_config(workspace.child, workspace.root / "fp8", "trtllm", quantization="fp8", max_num_tokens=256))
    return workspace.root / "fp8"


@pytest.fixture(scope="session")
def engine(workspace: Workspace) -> Path:
    """``export=trtllm_engine_checkpoint`` of ``child`` in FP8, TP 2 x PP 2."""
    from nemo_prolong.export.run import export

    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    output = workspace.root / "engine"
    export(target_config(workspace.child, output, "trtllm_engine_checkpoint", quantization="fp8", **layout))
    return output


@pytest.fixture
def damaged(fp8: Path, tmp_path: Path) -> Path:
    """A copy of the FP8 directory that a test may change."""
    return Path(shutil.copytree(fp8, tmp_path / "damaged"))
