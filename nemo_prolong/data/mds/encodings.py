"""Column encodings of MDS: one Python value to bytes and back.

Owns the encodings that token data use: ``str``, ``bytes``, ``json``, ``int``, fixed-width numbers and
``ndarray[:dtype[:shape]]``. ``pkl`` and image encodings are refused: reading data must never run code from a file.
Everything is little-endian. A value that would not come back as it was given is refused, not rounded.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        encode: Value to bytes; raises ValueError, TypeError or OverflowError for a value of another kind.
        decode: Bytes-like to value; raises ValueError or IndexError for bytes that are no such value.
        measure: Bytes of a value, from its shape (arrays of a fixed dtype) or itself (the others), without encoding it.
    """

    name: str
    size_bytes: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[memoryview], Any]
    measure: Callable[[Any], int]

    def __reduce__(self) -> tuple[Any, ...]:
        # The functions cannot be pickled, and loader processes that are spawned get a pickled reader.
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
        return Encoding(name, 8, _encode_int, lambda data: int(_scalar(data, "<i8")), lambda _: 8)
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


def _encode_text(value: Any) -> bytes:
    return str(_checked(str, value)).encode()


def _encode_bytes(value: Any) -> bytes:
    return bytes(_checked(bytes, value))


def _encode_json(value: Any) -> bytes:
    return json.dumps(value).encode()


_TEXT = {
    "str": Encoding("str", None, _encode_text, lambda data: str(data, "utf-8"), lambda text: len(_encode_text(text))),
    "bytes": Encoding("bytes", None, _encode_bytes, bytes, len),
    "json": Encoding(
        "json", None, _encode_json, lambda data: json.loads(bytes(data)), lambda value: len(_encode_json(value))
    ),
}


def _encode_int(value: Any) -> bytes:
    return _whole(value, np.dtype("<i8")).tobytes()


def _whole(value: Any, dtype: np.dtype[Any]) -> np.generic:
    """Return ``value`` as ``dtype``; NumPy alone would cut 3.7 to 3 and wrap -1 to 2**64 - 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"expected a whole number, got {value!r}") from None
    limits = np.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise ValueError(f"{number} is not between {limits.min} and {limits.max}")
    whole: np.generic = dtype.type(number)
    return whole


def _scalar(data: memoryview, dtype: str | np.dtype[Any]) -> Any:
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _scalar_encoding(name: str, dtype: np.dtype[Any]) -> Encoding:
    def encode(value: Any) -> bytes:
        number = _whole(value, dtype) if dtype.kind in "iu" else dtype.type(_checked(Real, value))
        return number.tobytes()

    return Encoding(name, dtype.itemsize, encode, lambda data: _scalar(data, dtype), lambda _: dtype.itemsize)


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
    return Encoding(name, codec.size_bytes, codec.encode, codec.decode, codec.measure)


@dataclass(frozen=True)
class _ArrayCodec:
    """Arrays: ``[dtype code: 1]?  [ndim << 2 | shape dtype: 1, shape]?  values``, each part only where not fixed."""

    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None

    @property
    def size_bytes(self) -> int | None:
        if self.dtype is None or self.shape is None:
            return None
        return prod(self.shape) * self.dtype.itemsize

    def measure(self, shape: tuple[int, ...]) -> int:
        if self.dtype is None:
            raise ValueError("the size of an array of any dtype does not follow from its shape")
        return (0 if self.shape is not None else len(_encode_shape(shape))) + prod(shape) * self.dtype.itemsize

    def encode(self, array: NDArray[Any]) -> bytes:
        array = _checked(np.ndarray, array)
        # A big-endian array has the name of the little-endian one and other bytes.
        storable = array.dtype.name in _DTYPE_CODES and array.dtype == np.dtype(array.dtype.name)
        if not storable or (self.dtype is not None and array.dtype != self.dtype):
            raise ValueError(f"expected an array of {self.dtype or 'numbers'}, got {array.dtype}")
        if self.shape is not None and array.shape != self.shape:
            raise ValueError(f"expected shape {self.shape}, got {array.shape}")
        if array.size == 0 or not 1 <= array.ndim <= _MAX_DIMENSIONS:
            raise ValueError(f"an array of shape {array.shape} cannot be stored")
        head = b"" if self.dtype is not None else bytes([_DTYPE_CODES[array.dtype.name]])
        return head + (b"" if self.shape is not None else _encode_shape(array.shape)) + array.tobytes()

    def decode(self, data: memoryview) -> NDArray[Any]:
        dtype, start = self.dtype, 0
        if dtype is None:
            if data[0] not in _CODE_DTYPES:
                raise ValueError(f"{data[0]} is no dtype code")
            dtype, start = np.dtype(_CODE_DTYPES[data[0]]), 1
        shape = self.shape
        if shape is None:
            shape, start = _decode_shape(data, start)
        if prod(shape) * dtype.itemsize != len(data) - start:
            raise ValueError(f"{len(data) - start} bytes are no {dtype} array of shape {shape}")
        return np.frombuffer(data[start:], dtype).reshape(shape)


def _encode_shape(shape: tuple[int, ...]) -> bytes:
    width = next(code for code in range(4) if max(shape) < 1 << (8 << code))
    return bytes([len(shape) << 2 | width]) + np.array(shape, _SHAPE_DTYPES[width]).tobytes()


def _decode_shape(data: memoryview, start: int) -> tuple[tuple[int, ...], int]:
    dimensions, width = data[start] >> 2, data[start] & 3
    end = start + 1 + (dimensions << width)
    shape = tuple(np.frombuffer(data[start + 1 : end], _SHAPE_DTYPES[width]).tolist())
    if len(shape) != dimensions or not shape or min(shape) < 1:
        raise ValueError(f"{shape} is no shape of a stored array")
    return shape, end
