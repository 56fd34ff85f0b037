"""One rank with a process group, which is all that callbacks need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_prolong.records.run_directory import RunDirectory


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The directory of a run, empty."""
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")
