"""What the engine cannot train yet is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import tiny_config

from nemo_prolong.errors import ConfigError
from nemo_prolong.stages.supported import check_supported


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": {"compute": "fp8"}},
            "precision.compute=fp8 precision.backend=auto: this version computes in fp32 or bf16 with the torch "
            "backend. Set precision=bf16 precision.backend=torch.",
        ),
    ],
)
def test_a_stage_the_engine_cannot_train_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_supported(tiny_config(tmp_path, tmp_path, **changes))
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "parallelism",
    [{}, {"context_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}],
)
def test_the_layouts_of_the_torch_backend_are_supported(tmp_path: Path, parallelism: dict[str, Any]) -> None:
    check_supported(tiny_config(tmp_path, tmp_path, parallelism=parallelism))
