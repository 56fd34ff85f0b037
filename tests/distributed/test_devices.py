"""What a process knows of GPUs: a stand-in for torch counts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_prolong.distributed import devices
from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.errors import ConfigError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], None]:
    """A function that makes this a machine with a driver and some GPUs."""
    monkeypatch.setattr(devices, "_DRIVER_FILES", (tmp_path / "dxg", tmp_path / "nvidiactl"))
    monkeypatch.setitem(sys.modules, "torch", None)

    def make(gpus: int) -> None:
        (tmp_path / "nvidiactl").touch()
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: gpus)))

    return make


def test_without_a_driver_there_is_no_gpu_and_no_torch(machine) -> None:
    assert devices.visible_gpus() == 0


def test_with_a_driver_torch_counts(machine) -> None:
    machine(3)
    assert devices.visible_gpus() == 3


def test_ranks_that_do_not_see_all_gpus_are_refused(machine) -> None:
    machine(1)
    with pytest.raises(ConfigError) as refusal:
        devices.check_devices(RankEnvironment(11, 3, 16, 8, "node1", 29500))
    assert str(refusal.value) == (
        "LOCAL_WORLD_SIZE=8: rank 11 sees 1 GPU, and every rank of a machine takes the one with its own number. "
        "Let every rank see all of them. Under srun, ask for --gpus-per-node=8, without --gpus-per-task and --gpu-bind."
    )
    machine(7)
    with pytest.raises(ConfigError, match="rank 11 sees 7 GPUs, and "):
        devices.check_devices(RankEnvironment(11, 3, 16, 8, "node1", 29500))


@pytest.mark.parametrize("gpus", [0, 8, 9])
def test_ranks_that_see_enough_gpus_or_none_go_on(gpus: int, machine) -> None:
    machine(gpus)
    devices.check_devices(RankEnvironment(11, 3, 16, 8, "node1", 29500))
