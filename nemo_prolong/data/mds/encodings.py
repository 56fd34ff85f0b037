"""Column encodings of MDS: one Python value to bytes and back.

Owns the encodings that token data use: ``str``, ``bytes``, ``json``, ``int``, fixed-width numbers and
``ndarray[:dtype[:shape]]``. ``pkl`` and image encodings are refused: reading data must never run code from a file.
Everything is little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_prolong.errors import DataError

_SCALARS = frozenset(
    {"uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"}
)
_DTYPE_CODES = {
    "uint8": 8,
    "int8": 9,
    "uint16": 16,
    "int16": 17,
    "float16": 18,
    "uint32": 32,
    "int32": 33,
    "float32": 34,
    "uint64": 64,
    "int64": 65,
    "float64": 66,
}
_CODE_DTYPES = {code: name for name, code in _DTYPE_CODES.items()}
_SHAPE_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_MAX_DIMENSIONS = 63


@dataclass(frozen=True)
class Encoding:
    """How the values of one column are stored.

    Attributes:
        name: The encoding as written in ``index.json``, e.g. ``ndarray:uint32``.
        size_bytes: Bytes of every value, or None where each value has its own size.
        encode: Value to bytes; raises ValueError for a value of another kind.
        decode: Bytes-like to value; raises ValueError for bytes that are no such value.
    """

    name: str
    size_bytes: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[memoryview], Any]

    def __reduce__(self) -> tuple[Any, ...]:
        # The two functions cannot be pickled, and loader processes that are spawned get a pickled reader.
        return parse_encoding, (self.name, "column")


def parse_encoding(name: str, where: str) -> Encoding:
    """Return the encoding called ``name``.

    Args:
        name: As in ``index.json``: ``str``, ``uint64``, ``ndarray:uint32``, ``ndarray:uint32:2,2``, ...
        where: What to name in an error, e.g. the index file and the column.

    Raises:
        DataError: If the encoding is ``pkl``, an image, or unknown.
    """
    kind, _, arguments = name.partition(":")
    if kind == "ndarray":
        return _ndarray_encoding(name, arguments, where)
    if name in _SCALARS:
        return _scalar_encoding(name, np.dtype(name))
    if name == "int":
        return Encoding(name, 8, lambda value: np.int64(value).tobytes(), lambda data: int(_scalar(data, "<i8")))
    if name in _TEXT:
        return _TEXT[name]
    raise DataError(
        f"{where}={name}",
        "is an encoding this reader refuses (pkl runs code from the file; images are no token data).",
        "Write the column as str, int, uint64, json or ndarray:DTYPE.",
    )


def _checked(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


_TEXT = {
    "str": Encoding("str", None, lambda value: _checked(str, value).encode(), lambda data: str(data, "utf-8")),
    "bytes": Encoding("bytes", None, lambda value: bytes(_checked(bytes, value)), bytes),
    "json": Encoding("json", None, lambda value: json.dumps(value).encode(), lambda data: json.loads(bytes(data))),
}


def _scalar(data: memoryview, dtype: str | np.dtype) -> Any:
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _scalar_encoding(name: str, dtype: np.dtype) -> Encoding:
    return Encoding(name, dtype.itemsize, lambda value: dtype.type(value).tobytes(), lambda data: _scalar(data, dtype))


def _ndarray_encoding(name: str, arguments: str, where: str) -> Encoding:
    dtype_name, _, shape_text = arguments.partition(":")
    try:
        shape = tuple(int(size) for size in shape_text.split(",")) if shape_text else None
    except ValueError:
        shape = ()
    if (dtype_name and dtype_name not in _DTYPE_CODES) or (shape is not None and (not shape or min(shape) < 1)):
        raise DataError(
            f"{where}={name}",
            "is no array encoding.",
            f"Use ndarray:DTYPE or ndarray:DTYPE:SIZE,SIZE with DTYPE in {', '.join(_DTYPE_CODES)}.",
        )
    codec = _ArrayCodec(np.dtype(dtype_name) if dtype_name else None, shape)
    return Encoding(name, codec.size_bytes, codec.encode, codec.decode)


@dataclass(frozen=True)
class _ArrayCodec:
    """Arrays: ``[dtype code: 1]?  [ndim << 2 | shape dtype: 1, shape]?  values``, each part only where not fixed."""

    dtype: np.dtype | None
    shape: tuple[int, ...] | None

    @property
    def size_bytes(self) -> int | None:
        if self.dtype is None or self.shape is None:
            return None
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def encode(self, array: np.ndarray) -> bytes:
        array = np.ascontiguousarray(_checked(np.ndarray, array))
        if array.dtype.name not in _DTYPE_CODES or (self.dtype is not None and array.dtype != self.dtype):
            raise ValueError(f"expected an array of {self.dtype or 'numbers'}, got {array.dtype}")
        if self.shape is not None and array.shape != self.shape:
            raise ValueError(f"expected shape {self.shape}, got {array.shape}")
        if array.size == 0 or array.ndim > _MAX_DIMENSIONS:
            raise ValueError(f"an array of shape {array.shape} cannot be stored")
        head = b"" if self.dtype is not None else bytes([_DTYPE_CODES[array.dtype.name]])
        return head + (b"" if self.shape is not None else _encode_shape(array.shape)) + array.tobytes()

    def decode(self, data: memoryview) -> np.ndarray:
        dtype, start = self.dtype, 0
        if dtype is None:
            if data[0] not in _CODE_DTYPES:
                raise ValueError(f"{data[0]} is no dtype code")
            dtype, start = np.dtype(_CODE_DTYPES[data[0]]), 1
        shape = self.shape
        if shape is None:
            shape, start = _decode_shape(data, start)
        return np.frombuffer(data[start:], dtype).reshape(shape)


def _encode_shape(shape: tuple[int, ...]) -> bytes:
    width = next(code for code in range(4) if max(shape) < 1 << (8 << code))
    return bytes([len(shape) << 2 | width]) + np.array(shape, _SHAPE_DTYPES[width]).tobytes()


def _decode_shape(data: memoryview, start: int) -> tuple[tuple[int, ...], int]:
    dimensions, width = data[start] >> 2, data[start] & 3
    end = start + 1 + (dimensions << width)
    return tuple(np.frombuffer(data[start + 1 : end], _SHAPE_DTYPES[width]).tolist()), end
