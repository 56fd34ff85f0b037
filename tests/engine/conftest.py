"""Stages trained once per session; the tests look at what they left on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.launches import TWO_RANK_LAYOUTS, job, train
from tests.support.tiny import tiny_config, write_data


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``data/`` and room for runs."""
    directory = tmp_path_factory.mktemp("engine")
    write_data(directory / "data")
    return directory


@pytest.fixture(scope="session")
def make_config(workspace: Path) -> Callable[..., Any]:
    """Make a tiny configuration in the workspace."""
    return lambda **changes: tiny_config(workspace / "data", workspace, **changes)


@pytest.fixture(scope="session")
def one_rank_runs(workspace: Path, make_config: Callable[..., Any]) -> Path:
    """One process that trains: whole runs in fp32 and bf16, their second halves again, transitions, and one step."""
    checkpoints = {"save_interval_steps": 4, "keep_last": 9}
    whole = make_config(name="whole", train={"train_iters": 8}, checkpoint=checkpoints)
    bf16 = make_config(name="bf16", precision={"compute": "bf16"}, train={"train_iters": 8}, checkpoint=checkpoints)
    half, end = (workspace / "whole" / "checkpoints" / f"step_0000000{step}" for step in (4, 8))
    bf16_half = workspace / "bf16" / "checkpoints" / "step_00000004"
    child: dict[str, Any] = {
        "stage": "stage2",
        "parent": str(workspace / "whole"),
        "model": {"rotary_base": 80000.0},
        # Warmup starts at zero: one step moves the moments and leaves the weights.
        "train": {"train_iters": 1},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "lr_warmup_iters": 1, "weight_decay": 0.05},
    }
    bf16_child = {"name": "bf16_carried", "transition": "weights_and_optimizer", "precision": {"compute": "bf16"}}
    bf16_child |= child | {"parent": str(workspace / "bf16")}
    train(
        [
            job(whole),
            job(whole.model_copy(update={"name": "resumed"}), resume=half),
            job(make_config(name="carried", transition="weights_and_optimizer", **child), parent_checkpoint=end),
            job(make_config(name="fresh", transition="weights", **child), parent_checkpoint=end),
            job(bf16),
            job(bf16.model_copy(update={"name": "bf16_resumed"}), resume=bf16_half),
            job(make_config(**bf16_child), parent_checkpoint=workspace / "bf16" / "checkpoints" / "step_00000008"),
            job(make_config(name="one_step", train={"train_iters": 1}, tracker={"tensorboard": True})),
        ],
        workspace,
    )
    return workspace


@pytest.fixture(scope="session")
def two_rank_runs(one_rank_runs: Path, make_config: Callable[..., Any]) -> Path:
    """The second half of the whole run on two ranks, from the checkpoint that one rank wrote."""
    half = one_rank_runs / "whole" / "checkpoints" / "step_00000004"
    configs = [
        make_config(name=name, parallelism=layout, train={"train_iters": 8})
        for name, layout in TWO_RANK_LAYOUTS.items()
    ]
    train([job(config, resume=half) for config in configs], one_rank_runs, ranks=2)
    return one_rank_runs
