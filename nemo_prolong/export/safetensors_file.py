"""Write a safetensors file one tensor after the other.

The library's own writer wants all tensors of a file in memory at once. The format is simple enough to stream. It has
eight bytes with the size of a JSON header, the header with every tensor's dtype, shape and place, then the tensors'
bytes. Writing takes one pass over the data, which is hashed on the way. It needs memory for the tensor being written
only. The disk is set to work while the rest is still being hashed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_prolong.files import FileDigest

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""Names of the dtypes that are written."""

_ALIGNMENT_BYTES = 8
"""The header is padded with spaces so that tensors start at a multiple of this."""

_WRITEBACK_BYTES = 2**25
"""Written between two requests to the kernel to bring it to the disk."""

_SYNC_FILE_RANGE_WRITE = 2
"""Start to write, do not wait: from the manual page of sync_file_range(2)."""

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written.

    Attributes:
        name: Name in the file.
        shape: Its shape.
    """

    name: str
    shape: tuple[int, ...]

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of its data."""
        return math.prod(self.shape) * dtype.itemsize


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], dtype: torch.dtype, tensors: Iterable[Iterable[Tensor]]
) -> FileDigest:
    """Write ``tensors`` to a new file and wait until the disk has it.

    Args:
        path: File, which must not exist.
        specs: Names and shapes, in the order of ``tensors``.
        dtype: float32 or bfloat16, of every tensor in the file.
        tensors: As many as ``specs``, each as consecutive blocks of its rows, of any floating dtype. A block is asked
            for when the one before it is written.
    """
    digest = hashlib.sha256()
    started = 0
    with path.open("xb", buffering=0) as file:

        def write(data: bytes | memoryview) -> None:
            nonlocal started
            digest.update(data)
            while data:
                data = memoryview(data)[file.write(data) :]
            if file.tell() - started >= _WRITEBACK_BYTES:
                _start_writeback(file.fileno(), started, file.tell() - started)
                started = file.tell()

        write(_header(specs, dtype))
        for spec, blocks in zip(specs, tensors, strict=True):
            rows = 0
            for block in blocks:
                assert block.shape[1:] == spec.shape[1:], (spec, block.shape)
                write(block.to(dtype).contiguous().view(torch.uint8).numpy().data.cast("B"))
                rows += len(block)
            assert rows == spec.shape[0], (spec, rows)
        os.fsync(file.fileno())
        return FileDigest(digest.hexdigest(), file.tell())


def _start_writeback(descriptor: int, start: int, count: int) -> None:
    """Ask for bytes of a file to be brought to the disk; a system that cannot do it earlier does it at the fsync."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, start, count, _SYNC_FILE_RANGE_WRITE)


def _header(specs: Sequence[TensorSpec], dtype: torch.dtype) -> bytes:
    """Return the size field and the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes(dtype)
        header[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
