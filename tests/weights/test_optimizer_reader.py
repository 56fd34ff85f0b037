"""A rank's elements of the optimizer state are read out of what ranks of any other layout have written."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_prolong.errors import CheckpointError
from nemo_prolong.weights import optimizer_reader
from nemo_prolong.weights.optimizer_reader import MatrixRun, OptimizerStateReader

MATRIX = "optimizer.state.exp_avg.module.decoder.layers.mlp.linear_fc2.weight"
LAYERS = 2


class Saved:
    """A checkpoint of one tensor that is stacked over layers, in the runs of some layout.

    Args:
        directory: Where it goes.
        tensor: The tensor [layers, rows, columns].
        boxes: Boxes that each layer is cut into, by rows and by columns, as TP does.
        ranks: Runs that the elements of all boxes are cut into, as the distributed optimizer does.
    """

    def __init__(self, directory: Path, tensor: torch.Tensor, boxes: tuple[int, int], ranks: int) -> None:
        self.checkpoint = directory
        (directory / "weights").mkdir(parents=True, exist_ok=True)
        box = [size // number for size, number in zip(tensor.shape[1:], boxes, strict=True)]
        size = torch.Size((len(tensor), *boxes, box[0] * box[1]))
        file, storage, chunks = io.BytesIO(), {}, []
        for layer, row, column in itertools.product(range(len(tensor)), *map(range, boxes)):
            part = tensor[layer, row * box[0] : (row + 1) * box[0], column * box[1] : (column + 1) * box[1]].flatten()
            for start, stop in cuts(len(part), ranks):
                offsets = torch.Size((layer, row, column, start))
                chunks.append(ChunkStorageMetadata(offsets, torch.Size((1, 1, 1, stop - start))))
                first = file.tell()
                torch.save(part[start:stop].clone().view(1, 1, 1, -1), file)
                storage[MetadataIndex(MATRIX, offsets)] = _StorageInfo("__0_0.distcp", first, file.tell() - first)
        entries = {MATRIX: TensorStorageMetadata(TensorProperties(tensor.dtype), size, chunks)}
        metadata = Metadata(entries, storage_data=storage)
        metadata.mcore_data = {MATRIX: {"nd_reformulated_orig_global_shape": tuple(tensor.shape)}}
        (directory / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
        self.file = directory / "weights" / "__0_0.distcp"
        self.file.write_bytes(file.getvalue())


def cuts(length: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Yield runs of unequal lengths that are a whole."""
    bounds = sorted({0, length, *(length * rank // ranks + rank % 3 for rank in range(1, ranks))} - {length + 1})
    yield from itertools.pairwise([bound for bound in bounds if bound <= length])


def read(
    checkpoint: Path, offsets: Sequence[int], shape: Sequence[int], start: int, stop: int, layer: int = 1
) -> torch.Tensor:
    destination = torch.full((stop - start,), torch.nan)
    OptimizerStateReader(checkpoint).fill(MATRIX, MatrixRun.of(offsets, shape, start, stop), destination, layer)
    return destination


grids = st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)])


@settings(max_examples=60, deadline=None)
@given(written=grids, read_as=grids, writers=st.integers(1, 7), readers=st.integers(1, 7), block=st.integers(4, 200))
def test_every_layout_reads_what_every_other_has_written(
    tmp_path_factory: pytest.TempPathFactory,
    written: tuple[int, int],
    read_as: tuple[int, int],
    writers: int,
    readers: int,
    block: int,
) -> None:
    tensor = torch.arange(LAYERS * 12 * 8.0).view(LAYERS, 12, 8)
    saved = Saved(tmp_path_factory.mktemp("saved"), tensor, written, writers)
    rows, columns = (size // number for size, number in zip((12, 8), read_as, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_reader, "BLOCK_BYTES", block)
        for row, column in itertools.product(range(0, 12, rows), range(0, 8, columns)):
            expected = tensor[1, row : row + rows, column : column + columns].flatten()
            for start, stop in cuts(rows * columns, readers):
                found = read(saved.checkpoint, (row, column), (rows, columns), start, stop)
                assert torch.equal(found, expected[start:stop])


def test_no_more_is_read_at_once_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, read_bytes = torch.randn(LAYERS, 64, 8), []
    saved = Saved(tmp_path, tensor, (1, 1), 1)
    exactly = optimizer_reader.read_exactly

    def noting(file: FileIO, block: torch.Tensor) -> None:
        read_bytes.append(block.nbytes)
        exactly(file, block)

    monkeypatch.setattr(optimizer_reader, "read_exactly", noting)
    monkeypatch.setattr(optimizer_reader, "BLOCK_BYTES", 640)
    assert torch.equal(read(saved.checkpoint, (0, 0), (64, 8), 0, 512), tensor[1].flatten())
    assert read_bytes == [640, 640, 640, 128]


def test_rows_beyond_a_smaller_vocabulary_are_zero(tmp_path: Path) -> None:
    tensor = torch.randn(LAYERS, 6, 4)
    saved = Saved(tmp_path, tensor, (2, 1), 3)
    # The box begins within what is there, and the run within a row.
    found = read(saved.checkpoint, (4, 0), (4, 4), 2, 15)
    assert torch.equal(found[:6], tensor[1, 4:6].flatten()[2:]) and not found[6:].any()
    assert not read(saved.checkpoint, (8, 0), (4, 4), 0, 16).any()


def test_a_run_that_is_saved_nowhere_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, torch.randn(LAYERS, 6, 4), (1, 1), 1)
    path = saved.checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    del metadata.state_dict_metadata[MATRIX].chunks[1]
    path.write_bytes(pickle.dumps(metadata))
    assert len(read(saved.checkpoint, (0, 0), (6, 4), 0, 24, layer=0)) == 24
    with pytest.raises(CheckpointError) as refusal:
        read(saved.checkpoint, (0, 0), (6, 4), 3, 24)
    assert str(refusal.value) == (
        f"{tmp_path}: the checkpoint does not hold all of {MATRIX} (0 of 21 elements are there). "
        "Use another checkpoint."
    )


def test_a_state_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, torch.randn(LAYERS, 6, 4), (1, 1), 1)
    other = MATRIX.replace("exp_avg", "exp_avg_sq")
    with pytest.raises(CheckpointError, match=rf"does not hold all of {other} \(none of it is there\)"):
        OptimizerStateReader(saved.checkpoint).fill(other, MatrixRun(0, 0, 4, 0, 4), torch.empty(4), 0)


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, torch.randn(LAYERS, 64, 64), (1, 1), 1)
    reader, run, destination = OptimizerStateReader(tmp_path), MatrixRun(0, 0, 64, 0, 4096), torch.empty(4096)
    reader.fill(MATRIX, run, destination, 1)
    saved.file.write_bytes(saved.file.read_bytes()[:20000])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp ends \d+ bytes too early"):
        reader.fill(MATRIX, run, destination, 1)


def test_a_chunk_of_another_length_than_noted_is_refused(tmp_path: Path) -> None:
    saved = Saved(tmp_path, torch.randn(LAYERS, 6, 4), (1, 1), 1)
    path = saved.checkpoint / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.mcore_data[MATRIX]["nd_reformulated_orig_global_shape"] = (LAYERS, 6, 3)
    metadata.state_dict_metadata[MATRIX].chunks[1] = ChunkStorageMetadata(
        torch.Size((1, 0, 0, 0)), torch.Size((1, 1, 1, 18))
    )
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp holds a chunk in another form than \.metadata says"):
        read(saved.checkpoint, (0, 0), (6, 3), 0, 18)


def test_boxes_of_earlier_versions_are_read_under_their_name(tmp_path: Path) -> None:
    tensor, former = torch.randn(6, 4), "optimizer.state.param.module.embedding.word_embeddings.weight"
    file, storage, chunks = io.BytesIO(), {}, []
    for row in (0, 3):
        offsets = torch.Size((row, 0))
        chunks.append(ChunkStorageMetadata(offsets, torch.Size((3, 4))))
        first = file.tell()
        torch.save(tensor[row : row + 3].clone(), file)
        storage[MetadataIndex(former, offsets)] = _StorageInfo("__0_0.distcp", first, file.tell() - first)
    entries = {former: TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)}
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "__0_0.distcp").write_bytes(file.getvalue())
    (tmp_path / "weights" / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    found = torch.empty(10)
    key = "optimizer.state.fp32_param.module.embedding.word_embeddings.weight"
    OptimizerStateReader(tmp_path).fill(key, MatrixRun.of((2, 0), (4, 4), 1, 11), found)
    assert torch.equal(found, tensor[2:].flatten()[1:11])


def test_a_vector_is_read_in_parts(tmp_path: Path) -> None:
    run = MatrixRun.of((5,), (7,), 2, 6)
    assert list(run.rectangles()) == [(0, 7, 1, 4, 0)]
    whole = MatrixRun.of((2, 3), (4, 5), 3, 18)
    assert list(whole.rectangles()) == [(2, 6, 1, 2, 0), (3, 3, 2, 5, 2), (5, 3, 1, 3, 12)]
