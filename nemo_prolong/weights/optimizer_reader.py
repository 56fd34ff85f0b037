"""Read optimizer state of a distributed checkpoint, whatever layout wrote it, straight to where a rank keeps it.

Megatron's distributed optimizer gives each rank a run of the elements of its part of a matrix, row by row. The part
depends on TP and PP, the run on DP and CP. A run is at most three rectangles of the whole matrix: the rest of a row,
whole rows, and the beginning of a row. So is what a saved chunk holds. What both have is copied, through one small
block. No rank holds more than its own state and that block, and no file but the checkpoint is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights.direct_reader import BLOCK_BYTES, Chunk, DirectReader, read_exactly
from nemo_prolong.weights.pickles import read_metadata

_FORMER_NAMES = {"optimizer.state.fp32_param.": "optimizer.state.param."}
"""fp32 weights in checkpoints whose saves gathered the state."""


class _Rectangle(NamedTuple):
    """Part of a matrix that lies row by row in a run of elements.

    Attributes:
        row: First row in the whole matrix.
        column: First column in the whole matrix.
        rows: Rows.
        columns: Columns.
        first: Place of its first element in the run.
    """

    row: int
    column: int
    rows: int
    columns: int
    first: int


class MatrixRun(NamedTuple):
    """A run of the elements of a box of a matrix, in row-major order. A vector is a matrix of one row.

    Attributes:
        row: First row of the box in the whole matrix.
        column: First column of the box in the whole matrix.
        columns: Columns of the box.
        start: First element of the run in the box.
        stop: Element of the box after the run.
    """

    row: int
    column: int
    columns: int
    start: int
    stop: int

    @classmethod
    def of(cls, offsets: Sequence[int], shape: Sequence[int], start: int, stop: int) -> MatrixRun:
        """Return a run of the elements of a box of a matrix or a vector.

        Args:
            offsets: Of the box in the whole tensor, by dim.
            shape: Of the box.
            start: First element of the run.
            stop: Element after the run.
        """
        assert len(offsets) == len(shape) in (1, 2), (offsets, shape)
        return cls(offsets[0] if len(offsets) == 2 else 0, offsets[-1], shape[-1], start, stop)

    def rectangles(self) -> Iterator[_Rectangle]:
        """Yield the rectangles of the whole matrix that the run is made of, in order."""
        place, first = self.start, 0
        while place < self.stop:
            row, column = divmod(place, self.columns)
            left = self.stop - place
            if column or left < self.columns:
                rows, columns = 1, min(self.columns - column, left)
            else:
                rows, columns = left // self.columns, self.columns
            yield _Rectangle(self.row + row, self.column + column, rows, columns, first)
            place, first = place + rows * columns, first + rows * columns


class _SavedRun(NamedTuple):
    """What a saved chunk holds, and where it is."""

    run: MatrixRun
    place: MetadataIndex


class OptimizerStateReader:
    """Optimizer state in one checkpoint, a run of elements at a time.

    It reads what saves of this software write, which is a run of elements a chunk, and what earlier versions wrote,
    which is a box a chunk.

    Args:
        checkpoint: A directory ``checkpoints/step_XXXXXXXX``. Nothing in it is executed.

    Raises:
        CheckpointError: If the directory holds no distributed checkpoint, or one that this software did not write.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._storage = DirectReader(checkpoint / "weights")
        metadata = read_metadata(checkpoint)
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._extra: dict[str, dict[str, Any]] = getattr(metadata, "mcore_data", None) or {}
        self._saved: dict[str, dict[int | None, list[_SavedRun]]] = {}

    @torch.no_grad()
    def fill(self, key: str, run: MatrixRun, destination: torch.Tensor, layer: int | None = None) -> None:
        """Fill a tensor with a run of elements. Rows that the checkpoint does not have become zero.

        These are rows that pad a vocabulary, of which another TP has another number.

        Args:
            key: Name of the state, such as ``optimizer.state.exp_avg.module.decoder.final_layernorm.weight``.
            run: Which elements.
            destination: Contiguous [N] of the run's elements, of any dtype on any device.
            layer: Which layer, for a tensor that is stacked over layers in dim 0.

        Raises:
            CheckpointError: If files of the checkpoint are missing or damaged, or it does not hold the state.
        """
        name = self._name(key)
        shape = self._global_shape(name)[0 if layer is None else 1 :]
        covered = 0
        here = list(run.rectangles())
        try:
            for saved in self._runs(name).get(layer, ()):
                covered += self._copy(saved, here, destination)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise self._incomplete(name, (str(error) or type(error).__name__).splitlines()[0]) from error
        beyond = [_beyond(rectangle, shape[0] if len(shape) == 2 else 1) for rectangle in here]
        for rectangle, rows in zip(here, beyond, strict=True):
            _view(destination, rectangle)[rectangle.rows - rows :].zero_()
        expected = destination.numel() - sum(
            rows * rectangle.columns for rectangle, rows in zip(here, beyond, strict=True)
        )
        if covered != expected:
            raise self._incomplete(name, f"{covered} of {expected} elements are there")

    def _name(self, key: str) -> str:
        """Return the name of a state in this checkpoint."""
        for prefix, former in _FORMER_NAMES.items():
            if key not in self._entries and key.startswith(prefix):
                key = former + key.removeprefix(prefix)
        if key not in self._entries:
            raise self._incomplete(key, "none of it is there")
        return key

    def _global_shape(self, name: str) -> Sequence[int]:
        """Return the shape of the whole tensor. Megatron saves runs under another shape and notes the real one."""
        noted = self._extra.get(name, {}).get("nd_reformulated_orig_global_shape")
        return tuple(noted or self._entries[name].size)

    def _runs(self, name: str) -> dict[int | None, list[_SavedRun]]:
        """Return what chunks hold of a tensor, by layer; by None where it is not stacked."""
        found = self._saved.get(name)
        if found is None:
            found = self._saved[name] = defaultdict(list)
            for layer, run, offsets in _saved_runs(self._entries[name], self._global_shape(name), name):
                found[layer].append(_SavedRun(run, MetadataIndex(name, offsets)))
        return found

    def _copy(self, saved: _SavedRun, here: Sequence[_Rectangle], destination: torch.Tensor) -> int:
        """Copy what a chunk has of some rectangles; return how many elements those are."""
        pairs = [
            (source, target)
            for source in saved.run.rectangles()
            for target in here
            if max(source.row, target.row) < min(source.row + source.rows, target.row + target.rows)
            and max(source.column, target.column) < min(source.column + source.columns, target.column + target.columns)
        ]
        if not pairs:
            return 0
        with self._storage.opened(saved.place) as (file, chunk):
            if not chunk.plain or chunk.shape.numel() != saved.run.stop - saved.run.start:
                raise OSError(f"{file.name} holds a chunk in another form than .metadata says")
            return sum(_copy_rectangle(file, chunk, source, target, destination) for source, target in pairs)

    def _incomplete(self, name: str, found: str) -> CheckpointError:
        return CheckpointError(
            str(self._checkpoint), f"the checkpoint does not hold all of {name} ({found}).", "Use another checkpoint."
        )


def _saved_runs(
    entry: TensorStorageMetadata, shape: Sequence[int], name: str
) -> Iterator[tuple[int | None, MatrixRun, torch.Size]]:
    """Yield layer, run and offsets of every chunk of a tensor.

    Args:
        entry: Its entry in the metadata.
        shape: Of the whole tensor, with layers in dim 0 where it is stacked.
        name: Says whether it is stacked.
    """
    dims = 1 if ".decoder.layers." in name else 0
    for chunk in entry.chunks:
        if len(chunk.offsets) == len(shape):
            offsets, box = tuple(chunk.offsets), tuple(chunk.sizes)
            start, stop = 0, chunk.sizes.numel()
        else:
            # The last dim is the place in the box, and the others number the boxes.
            box = tuple(size // number for size, number in zip(shape, entry.size[:-1], strict=True))
            offsets = tuple(place * size for place, size in zip(chunk.offsets[:-1], box, strict=True))
            start, stop = chunk.offsets[-1], chunk.offsets[-1] + chunk.sizes[-1]
        assert box[:dims] == (1,) * dims, f"a chunk of {name} holds several layers"
        layer = offsets[0] if dims else None
        yield layer, MatrixRun.of(offsets[dims:], box[dims:], start, stop), chunk.offsets


def _beyond(rectangle: _Rectangle, rows: int) -> int:
    """Return how many rows of a rectangle a matrix of so many rows does not have."""
    return min(max(rectangle.row + rectangle.rows - rows, 0), rectangle.rows)


def _view(run: torch.Tensor, rectangle: _Rectangle) -> torch.Tensor:
    """Return a rectangle [rows, columns] of what holds its run."""
    return run[rectangle.first : rectangle.first + rectangle.rows * rectangle.columns].view(rectangle.rows, -1)


def _copy_rectangle(
    file: FileIO, chunk: Chunk, source: _Rectangle, target: _Rectangle, destination: torch.Tensor
) -> int:
    """Copy what two rectangles have in common, some rows of the file at a time; return how many elements that is."""
    row, end_row = max(source.row, target.row), min(source.row + source.rows, target.row + target.rows)
    column = max(source.column, target.column)
    end_column = min(source.column + source.columns, target.column + target.columns)
    common = _view(destination, target)[
        row - target.row : end_row - target.row, column - target.column : end_column - target.column
    ]
    first = source.first + (row - source.row) * source.columns
    file.seek(chunk.data_offset + first * chunk.dtype.itemsize)
    for part in common.split(max(1, BLOCK_BYTES // (source.columns * chunk.dtype.itemsize))):
        block = torch.empty(len(part), source.columns, dtype=chunk.dtype)
        read_exactly(file, block)
        part.copy_(block[:, column - source.column : end_column - source.column])
    return common.numel()
