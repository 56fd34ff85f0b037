"""Read tensors of a distributed checkpoint straight into their destination.

torch's own reader unpickles every saved chunk into a tensor of its own, checks the archive's CRC and copies: half of
the time and twice the memory of an export. Here only the description of a chunk is unpickled, and its bytes are read to
where they belong. Whether they are the right ones is for the checkpoint's own hashes to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

BLOCK_BYTES = 8 * 2**20
"""Read at once where the destination is not contiguous."""


class Chunk(NamedTuple):
    """A saved piece of a tensor.

    Attributes:
        plain: Whether its data is contiguous and unchanged.
        shape: Shape.
        dtype: Dtype.
        data_offset: First byte of its data in the file.
    """

    plain: bool
    shape: torch.Size
    dtype: torch.dtype
    data_offset: int


class DirectReader(FileSystemReader):
    """torch's reader of checkpoint files, with a short way for chunks that are plain contiguous tensors.

    Args:
        directory: Directory of the checkpoint files.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._chunks: dict[MetadataIndex, Chunk] = {}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for; see ``FileSystemReader``. Several threads may call it at once."""
        left = [item for item in plan.items if not self._read_directly(item, planner)]
        return super().read_data(LoadPlan(left), planner)

    @contextmanager
    def opened(self, index: MetadataIndex) -> Iterator[tuple[FileIO, Chunk]]:
        """Open the file that holds a saved piece of a tensor, and say where in it the piece lies.

        Raises:
            OSError, RuntimeError, UnpicklingError: If the file is missing or damaged.
        """
        info = self.storage_data[index]
        with open(os.path.join(self.path, info.relative_path), "rb", buffering=0) as file:
            chunk = self._chunks.get(index)
            if chunk is None:
                chunk = self._chunks[index] = self._describe(file, info)
            yield file, chunk

    def _read_directly(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read one item; return whether its chunk was of the kind that can be read so."""
        with self.opened(item.storage_index) as (file, chunk):
            if not chunk.plain or not _is_row_range(item, chunk.shape):
                return False
            file.seek(chunk.data_offset + _first_element(item, chunk.shape) * chunk.dtype.itemsize)
            _read_into(file, planner.resolve_tensor(item).detach(), chunk.dtype)
        return True

    def _describe(self, file: IO[bytes], info: Any) -> Chunk:
        nothing = Chunk(False, torch.Size(), torch.uint8, 0)
        if info.transform_descriptors:
            return nothing
        # A tensor on the meta device has no data; its storage knows where in the archive that lies.
        tensor = torch.load(self._slice_file(file, info), map_location="meta", weights_only=True)
        in_archive = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if in_archive is None or not tensor.dim() or tensor.storage_offset() or not tensor.is_contiguous():
            return nothing
        return Chunk(True, tensor.shape, tensor.dtype, info.offset + in_archive)


def _is_row_range(item: ReadItem, shape: torch.Size) -> bool:
    """Whether the item's bytes are one run of the chunk's: entries of one dim, of one entry in every dim before it."""
    whole_from = len(shape)
    while whole_from > 0 and item.lengths[whole_from - 1] == shape[whole_from - 1]:
        whole_from -= 1
    return all(length == 1 for length in item.lengths[: max(0, whole_from - 1)])


def _first_element(item: ReadItem, shape: torch.Size) -> int:
    """Return the place of the item's first element in the chunk."""
    place = 0
    for offset, size in zip(item.storage_offsets, shape, strict=True):
        place = place * size + offset
    return place


def _read_into(file: FileIO, destination: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill a tensor with the file's next bytes, through a small block where its memory has gaps.

    Raises:
        OSError: If the file ends before.
    """
    while destination.dim() > 2 and len(destination) == 1:
        destination = destination[0]
    if destination.dtype == dtype and destination.is_contiguous():
        read_exactly(file, destination)
        return
    row_bytes = max(1, destination[:1].numel() * dtype.itemsize)
    for part in destination.split(max(1, BLOCK_BYTES // row_bytes)):
        block = torch.empty(part.shape, dtype=dtype)
        read_exactly(file, block)
        part.copy_(block)


def read_exactly(file: FileIO, tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor on the CPU with the file's next bytes.

    Raises:
        OSError: If the file ends before.
    """
    rest = tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")
    while rest:
        count = file.readinto(rest)
        if not count:
            raise OSError(f"{file.name} ends {len(rest)} bytes too early")
        rest = rest[count:]
