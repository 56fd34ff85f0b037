"""Tensors read straight into their place are those that torch's own reader gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException

from nemo_prolong.weights.direct_reader import DirectReader

TENSORS = {
    "matrix": torch.randn(37, 24),
    "norm": torch.randn(24).bfloat16(),
    "stacked": torch.randn(3, 20, 8),
    # Saved with its strides, so its bytes are in another order than its rows.
    "transposed": torch.randn(8, 20).T,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save(dict(TENSORS), storage_writer=FileSystemWriter(directory), no_dist=True)
    return directory


def test_every_tensor_is_that_of_torchs_reader(checkpoint: Path) -> None:
    for name, tensor in TENSORS.items():
        for reader in (DirectReader(checkpoint), FileSystemReader(checkpoint)):
            found = {name: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)}
            load(found, storage_reader=reader, no_dist=True)
            assert torch.equal(found[name], tensor), (name, reader)


def test_only_what_lies_in_order_is_read_directly(checkpoint: Path) -> None:
    reader = DirectReader(checkpoint)
    load({name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}, storage_reader=reader, no_dist=True)
    assert {index.fqn: chunk.plain for index, chunk in reader._chunks.items()} == {
        "matrix": True,
        "norm": True,
        "stacked": True,
        "transposed": False,
    }


def test_a_destination_with_gaps_is_filled(checkpoint: Path) -> None:
    wide = torch.full((37, 48), torch.nan)
    load({"matrix": wide[:, 12:36]}, storage_reader=DirectReader(checkpoint), no_dist=True)
    assert torch.equal(wide[:, 12:36], TENSORS["matrix"])
    assert wide[:, :12].isnan().all() and wide[:, 36:].isnan().all()


def test_a_file_that_ends_too_early_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    reader = DirectReader(copy)
    load({"matrix": torch.empty(37, 24)}, storage_reader=reader, no_dist=True)
    for path in copy.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointException, match=r"ends \d+ bytes too early"):
        load({"matrix": torch.empty(37, 24)}, storage_reader=reader, no_dist=True)
