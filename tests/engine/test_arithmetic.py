"""What a stage asks of torch's arithmetic and of Lightning, whatever the image or the surroundings left behind."""

from __future__ import annotations

import sys

import pytest

from tests.support.launcher_variables import slurm_task
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

# The trainer of rank 5, the second of the second machine.
from pathlib import Path
from torch.distributed import HashStore
from nemo_prolong.distributed.launched import take_place
from nemo_prolong.engine.training.trainer import build_trainer
from tests.support.tiny import tiny_config
take_place()
config = tiny_config(Path("data"), Path("runs"), train={"global_batch_size": 8})
trainer = build_trainer(config, [], validate=False, store=HashStore())
ranks = trainer.strategy.cluster_environment
print(type(ranks).__name__, ranks.creates_processes_externally, ranks.main_address, ranks.main_port)
print(trainer.num_devices, trainer.num_nodes)
print(ranks.global_rank(), ranks.local_rank(), ranks.node_rank(), ranks.world_size())
trainer.strategy.set_world_ranks()
print(trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size)
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    # The rank is a task of Slurm, in a job whose numbers are others.
    task = slurm_task(5, nodes=2, tasks_per_node=4, job=7)
    return run_program(
        [sys.executable, "-c", PROGRAM], **task | {"SLURM_NTASKS_PER_NODE": "64", "SLURM_NNODES": "1"}
    ).splitlines()[-6:]


@pytest.fixture
def settings(printed: list[str]) -> list[str]:
    return printed[:2]


def test_lightning_is_told_the_devices_of_one_node_and_the_nodes(printed: list[str]) -> None:
    assert printed[2:] == ["LaunchedRank True localhost 20007", "4 2", "5 1 1 8", "5 1 1 8"]


def test_products_of_fp32_are_not_made_in_tf32(settings: list[str]) -> None:
    assert [line.split()[0] for line in settings] == ["highest", "highest"]


def test_deterministic_training_warns_and_asks_cublas(settings: list[str]) -> None:
    assert [line.split()[1::2] for line in settings] == [["1", ":4096:8"], ["0", "None"]]


def test_new_tensors_are_not_filled_before_they_are_written(settings: list[str]) -> None:
    assert [line.split()[2] for line in settings] == ["False", "False"]
