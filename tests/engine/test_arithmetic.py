"""What a stage asks of torch's arithmetic, whatever the image or an earlier stage of the process left behind."""

from __future__ import annotations

import sys

import pytest

from tests.support.launches import run_program

# An image of NVIDIA lets torch multiply in TF32 by an environment variable; what it leaves is this setting.
PROGRAM = """
import os, torch
torch.set_float32_matmul_precision("high")
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
from nemo_prolong.engine.patches import prepare
prepare()
from nemo_prolong.engine.training.stage_training import _set_arithmetic
for deterministic in (True, False):
    _set_arithmetic(deterministic)
    print(
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None),
    )
"""


@pytest.fixture(scope="module")
def settings() -> list[str]:
    return run_program([sys.executable, "-c", PROGRAM]).splitlines()[-2:]


def test_products_of_fp32_are_not_made_in_tf32(settings: list[str]) -> None:
    assert [line.split()[0] for line in settings] == ["highest", "highest"]


def test_deterministic_training_warns_and_asks_cublas(settings: list[str]) -> None:
    assert [line.split()[1::2] for line in settings] == [["1", ":4096:8"], ["0", "None"]]


def test_new_tensors_are_not_filled_before_they_are_written(settings: list[str]) -> None:
    assert [line.split()[2] for line in settings] == ["False", "False"]
