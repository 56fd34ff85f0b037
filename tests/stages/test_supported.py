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
            {"parallelism": {"context_parallel_size": 2}},
            "parallelism.context_parallel_size=2: this version keeps every document on one rank. "
            "Set parallelism.context_parallel_size=1.",
        ),
        (
            {"parallelism": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            "parallelism.sequence_parallel=true: the torch layers of this version do not split norms over "
            "tensor-parallel ranks. Set parallelism.sequence_parallel=false.",
        ),
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


def test_the_miniature_stage_is_supported(tmp_path: Path) -> None:
    check_supported(tiny_config(tmp_path, tmp_path))
