"""Stream a checkpoint into sharded safetensors with an index.

Every file's content is known from shapes alone before the first tensor is read, so rows go from the checkpoint to
their place on disk block by block, and no tensor is ever in memory whole. Several files are written at once, because
hashing alone takes a core each.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.safetensors_file import TensorSpec, write_safetensors
from nemo_prolong.export.source import ExportSource
from nemo_prolong.files import FileDigest, write_json_atomically
from nemo_prolong.units import format_bytes
from nemo_prolong.weights.names import Piece, pieces

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"

_SPARE_WRITERS = 1
"""Beyond one for each core: while it waits for the disk, the others compute."""

_BLOCK_BYTES = 2**22
"""Read, hashed and written in one go: smaller blocks cost more to plan, larger ones leave the processor's cache."""

_INFINITY_BITS = {torch.bfloat16: (torch.int16, 0x7F80), torch.float32: (torch.int32, 0x7F800000)}
"""Of each dtype: the integers of its size, and infinity as one of them. NaN comes after it."""


def plan_shards(model: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, list[Piece]]:
    """Return what goes into which file, in the order of writing.

    A file takes tensors until the next would make its data larger than ``max_shard_bytes``. What Megatron fuses stays
    in one file; where that is larger by itself, the file holds nothing else.
    """
    shards: list[list[Piece]] = [[]]
    used = 0
    for piece in pieces(model):
        size = piece_bytes(piece, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(piece)
        used += size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def piece_bytes(piece: Piece, dtype: torch.dtype) -> int:
    """Return the bytes of the Hugging Face tensors of a piece."""
    return sum(math.prod(shape) for shape in piece.shapes) * dtype.itemsize


def write_weights(
    source: ExportSource, directory: Path, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, FileDigest]:
    """Write all weights and their index into ``directory``.

    Returns:
        The safetensors files by name.

    Raises:
        ExportError: If a weight is NaN or infinite.
        CheckpointError: If files of the checkpoint are missing.
    """
    shards = plan_shards(source.model, dtype, max_shard_bytes)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) + _SPARE_WRITERS) as pool:
        try:
            futures = {
                name: pool.submit(_write_shard, source, directory / name, shard, dtype)
                for name, shard in shards.items()
            }
            written = {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _write_index(directory, shards, dtype)
    return written


def _write_shard(source: ExportSource, path: Path, shard: list[Piece], dtype: torch.dtype) -> FileDigest:
    started = time.monotonic()
    specs = [spec for piece in shard for spec in map(TensorSpec, piece.names, piece.shapes)]
    written = write_safetensors(path, specs, dtype, _tensors(source, shard))
    rate = format_bytes(round(written.num_bytes / max(time.monotonic() - started, 1e-9)))
    log.info("wrote %s  %s  %s/s", path.name, format_bytes(written.num_bytes), rate)
    return written


def _tensors(source: ExportSource, shard: list[Piece]) -> Iterator[Iterator[Tensor]]:
    """Yield the Hugging Face tensors of a shard, each in blocks of rows."""
    for piece in shard:
        for part, name in enumerate(piece.names):
            yield _blocks(source, piece, part, name)


def _blocks(source: ExportSource, piece: Piece, part: int, name: str) -> Iterator[Tensor]:
    """Yield the rows of one Hugging Face tensor in one buffer; a model with NaN in it must not leave."""
    dtype, columns = source.reader.dtype(piece.rule.megatron), piece.shapes[part][1:]
    buffer = _room.take((max(1, _BLOCK_BYTES // (math.prod(columns) * dtype.itemsize)), *columns), dtype)
    for rows in piece.rule.row_ranges(source.model):
        if rows.part != part:
            continue
        for start in range(rows.start, rows.end, len(buffer)):
            block = buffer[: rows.end - start]
            source.read_rows(piece, start, block)
            if not all_finite(block):
                raise ExportError(
                    f"run={source.run_dir}",
                    f"{name} of {source.checkpoint.name} has NaN or infinity in it.",
                    "Train again from a checkpoint before the loss went wrong; metrics.jsonl tells when.",
                )
            yield block


class _Room(threading.local):
    """Memory of a thread, kept for its next tensor: from new memory the kernel first has to clear what was there."""

    memory = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor in it, which the next one overwrites."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self.memory.numel() < num_bytes:
            self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self.memory[:num_bytes].view(dtype).view(shape)


_room = _Room()


def all_finite(block: Tensor) -> bool:
    """Return whether a contiguous float32 or bfloat16 tensor on the CPU has neither NaN nor infinity.

    Infinity and NaN have the largest exponent: read as integers, positive ones are above all finite values, and read as
    unsigned integers negative ones are. That is faster than to ask for the extremes of the values.
    """
    integers, infinity = _INFINITY_BITS[block.dtype]
    bits = block.view(integers).numpy()
    sign = 1 << (8 * bits.itemsize - 1)
    return bool(bits.max() < infinity and bits.view(f"u{bits.dtype}").max() < sign + infinity)


def _write_index(directory: Path, shards: dict[str, list[Piece]], dtype: torch.dtype) -> None:
    weight_map = {name: file for file, shard in shards.items() for piece in shard for name in piece.names}
    total_size = sum(piece_bytes(piece, dtype) for shard in shards.values() for piece in shard)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json_atomically(directory / INDEX_FILE, index)
