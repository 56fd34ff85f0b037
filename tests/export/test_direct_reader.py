"""Tensors read straight into their place are those that torch's own reader gives."""

from __future__ import annotations

import io
import os
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from nemo_prolong.weights import direct_reader
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


def test_what_was_read_directly_is_not_read_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    read = FileSystemReader.read_data

    def noting(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        left.extend(item.storage_index.fqn for item in plan.items)
        return read(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", noting)
    load(
        {name: torch.empty_like(t) for name, t in TENSORS.items()},
        storage_reader=DirectReader(checkpoint),
        no_dist=True,
    )
    assert left == ["transposed"]


@pytest.mark.parametrize(
    ("lengths", "shape", "expected"),
    [
        ((3, 20, 8), (3, 20, 8), True),
        ((2, 20, 8), (3, 20, 8), True),
        ((1, 5, 8), (3, 20, 8), True),
        ((1, 1, 4), (3, 20, 8), True),
        ((2, 5, 8), (3, 20, 8), False),
        ((2, 1, 8), (3, 20, 8), False),
        ((1, 2, 4), (3, 20, 8), False),
        ((3, 20, 4), (3, 20, 8), False),
        ((37, 12), (37, 24), False),
        ((1, 12), (37, 24), True),
        ((5,), (24,), True),
    ],
)
def test_bytes_in_one_run_are_told_from_others(
    lengths: tuple[int, ...], shape: tuple[int, ...], expected: bool
) -> None:
    item: Any = SimpleNamespace(lengths=torch.Size(lengths))
    assert direct_reader._is_row_range(item, torch.Size(shape)) is expected


def test_a_compressed_chunk_is_left_to_torch(checkpoint: Path) -> None:
    chunk = DirectReader(checkpoint)._describe(io.BytesIO(), SimpleNamespace(transform_descriptors=["zstd"]))
    assert not chunk.plain


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_chunk_is_executed(checkpoint: Path, tmp_path: Path) -> None:
    archive, marker = io.BytesIO(), tmp_path / "executed"
    torch.save({"tensor": Payload(marker)}, archive)
    info = SimpleNamespace(transform_descriptors=None, offset=0, length=len(archive.getvalue()))
    with pytest.raises(UnpicklingError):
        DirectReader(checkpoint)._describe(archive, info)
    assert not marker.exists()


def test_a_destination_of_another_dtype_is_cast(tmp_path: Path) -> None:
    numbers = torch.arange(24).bfloat16().view(6, 4)
    (tmp_path / "numbers").write_bytes(numbers.view(torch.uint8).numpy().tobytes())
    destination = torch.empty(6, 4)
    with open(tmp_path / "numbers", "rb", buffering=0) as file:
        direct_reader._read_into(file, destination, torch.bfloat16)
    assert torch.equal(destination, numbers.float())


@pytest.mark.parametrize(
    ("shape", "block_bytes", "reads"),
    [
        # Rows of 16 bytes, as many as a block holds.
        ((6, 4), 32, [8, 8, 8]),
        ((6, 4), 16, [4] * 6),
        ((6, 4), 40, [8, 8, 8]),
        # One at least.
        ((6, 4), 1, [4] * 6),
        # A layer is rows too.
        ((1, 6, 4), 48, [12, 12]),
        ((1, 1, 6, 4), 48, [12, 12]),
        ((2, 3, 4), 48, [12, 12]),
        ((1, 24), 48, [24]),
    ],
)
def test_gaps_are_filled_block_by_block(
    shape: tuple[int, ...], block_bytes: int, reads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.arange(24, dtype=torch.float32).view(shape)
    (tmp_path / "numbers").write_bytes(numbers.numpy().tobytes())
    found: list[int] = []
    read = direct_reader.read_exactly

    def noting(file: Any, tensor: torch.Tensor) -> None:
        found.append(tensor.numel())
        read(file, tensor)

    monkeypatch.setattr(direct_reader, "read_exactly", noting)
    monkeypatch.setattr(direct_reader, "BLOCK_BYTES", block_bytes)
    wide = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan)
    with open(tmp_path / "numbers", "rb", buffering=0) as file:
        direct_reader._read_into(file, wide[..., : shape[-1]], torch.float32)
    assert torch.equal(wide[..., : shape[-1]], numbers) and found == reads
