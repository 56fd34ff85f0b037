"""Rows and directories for the tests of MDS, those with mosaicml-streaming included."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_prolong.data.mds import MdsReader, MdsWriter

COLUMNS = {
    "input_ids": "ndarray:uint32",
    "indices": "ndarray:uint32",
    "domain": "str",
    "length": "uint64",
    "mask": "ndarray:uint8",
}
SMALL_COLUMNS = {"input_ids": "ndarray:uint32", "domain": "str"}
ALL_COLUMNS = {
    "any": "ndarray",
    "blob": "bytes",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "fixed": "ndarray:int32:2,3",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "i8": "int8",
    "number": "int",
    "of": "ndarray:float32",
    "record": "json",
    "text": "str",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "u8": "uint8",
}
"""Every encoding that is owned here."""


def golden_row() -> dict[str, Any]:
    """Return the row whose bytes are written out in ``test_format.py``."""
    return {
        "input_ids": np.array([1, 2, 70000], np.uint32),
        "indices": np.array([[0, 1], [1, 3]], np.uint32),
        "domain": "co\u00e9de",
        "length": 3,
        "mask": np.array([0, 1, 1], np.uint8),
    }


def numbered_row(number: int) -> dict[str, Any]:
    """Return a row of ``SMALL_COLUMNS`` whose values tell its number."""
    return {"input_ids": np.full(number % 7 + 1, number, np.uint32), "domain": f"row {number}"}


def varied_row(number: int) -> dict[str, Any]:
    """Return a row of ``ALL_COLUMNS``."""
    rng = np.random.default_rng(number)
    dtypes = ["uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32", "uint64", "int64", "float64"]
    shape = tuple(rng.integers(1, 5, rng.integers(1, 5)))
    floats = {f"f{bits}": float(np.float16(rng.normal())) for bits in (16, 32, 64)}
    signed = {f"i{bits}": int(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) for bits in (8, 16, 32, 64)}
    unsigned = {f"u{bits}": int(rng.integers(0, 2**bits - 1, dtype=np.uint64)) for bits in (8, 16, 32, 64)}
    return {
        "any": rng.integers(0, 100, shape).astype(dtypes[number % len(dtypes)]),
        "blob": rng.bytes(number % 50),
        "fixed": rng.integers(-9, 9, (2, 3)).astype(np.int32),
        "number": int(rng.integers(-(2**63), 2**63 - 1)),
        "of": rng.normal(size=(number % 300 + 1,)).astype(np.float32),
        "record": {"a": [number, None, "\u4e2d"], "b": {"c": number / 7}},
        "text": "\u00e9\u4e2d\U0001f600"[: number % 4] * (number % 3),
        **floats,
        **signed,
        **unsigned,
    }


def packed_row(number: int, num_tokens: int) -> dict[str, Any]:
    """Return a row of ``COLUMNS``: tokens below 128,000 in up to 20 documents."""
    rng = np.random.default_rng(number)
    bounds = np.unique([0, num_tokens, *rng.integers(1, num_tokens, number % 20)])
    return {
        "input_ids": rng.integers(0, 128_000, num_tokens).astype(np.uint32),
        "indices": np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.uint32),
        "domain": f"domain {number % 3}",
        "length": num_tokens,
        "mask": rng.integers(0, 2, num_tokens).astype(np.uint8),
    }


def write(directory: Path, rows: Iterable[dict[str, Any]], columns: dict[str, str], **options: Any) -> Path:
    """Write rows; return the directory."""
    with MdsWriter(directory, columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return directory


def edit_index(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change ``index.json`` in place."""
    index = json.loads((directory / "index.json").read_text())
    edit(index)
    (directory / "index.json").write_text(json.dumps(index))


def flip(file: Path, position: int, bits: int) -> None:
    """Invert bits of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(bytes(data))


def domains(reader: MdsReader) -> list[str]:
    """Return the column ``domain`` of all rows."""
    return [reader[row]["domain"] for row in range(len(reader))]


def same_row(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether two rows have the same columns, types of arrays and values."""
    return left.keys() == right.keys() and all(_same(left[name], right[name]) for name in left)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool(np.array_equal(left, right))
    return bool(left == right)
