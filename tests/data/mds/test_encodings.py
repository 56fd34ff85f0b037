from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemo_prolong.data.mds.encodings import parse_encoding

_ARRAYS = st.sampled_from(["uint8", "int16", "uint32", "int32", "int64", "float32"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=300).filter(lambda s: np.prod(s) < 2000))
)


@given(_ARRAYS)
def test_any_array_survives_an_encoding(array: np.ndarray) -> None:
    for name in ("ndarray", f"ndarray:{array.dtype}", f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"):
        encoding = parse_encoding(name, "here")
        data = encoding.encode(array)
        assert encoding.size_bytes in (None, len(data))
        decoded = encoding.decode(memoryview(data))
        assert decoded.dtype == array.dtype
        np.testing.assert_array_equal(decoded, array)


@given(_ARRAYS)
def test_the_size_of_an_array_is_known_from_its_shape(array: np.ndarray) -> None:
    for name in (f"ndarray:{array.dtype}", f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"):
        encoding = parse_encoding(name, "here")
        assert encoding.measure(array.shape) == len(encoding.encode(array))


@given(st.text(), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1), st.binary())
def test_texts_numbers_and_bytes_survive_their_encodings(text: str, signed: int, unsigned: int, data: bytes) -> None:
    for name, value in {"str": text, "int": signed, "uint64": unsigned, "bytes": data, "json": {"a": [text]}}.items():
        encoding = parse_encoding(name, "here")
        encoded = encoding.encode(value)
        assert encoding.decode(memoryview(encoded)) == value
        assert encoding.measure(value) == len(encoded)


def test_an_array_that_is_not_contiguous_keeps_its_order() -> None:
    array = np.arange(12, dtype=np.uint32).reshape(3, 4).T
    encoding = parse_encoding("ndarray:uint32", "here")
    np.testing.assert_array_equal(encoding.decode(memoryview(encoding.encode(array))), array)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ndarray:uint32", np.zeros(3, np.int64), "expected an array of uint32, got int64"),
        ("ndarray:uint32", np.zeros(3, ">u4"), "expected an array of uint32, got >u4"),
        ("ndarray", np.zeros(3, ">u4"), "expected an array of numbers, got >u4"),
        ("ndarray", np.zeros(3, bool), "expected an array of numbers, got bool"),
        ("ndarray:uint32", np.zeros(0, np.uint32), r"an array of shape \(0,\) cannot be stored"),
        ("ndarray:uint32", np.zeros((), np.uint32), r"an array of shape \(\) cannot be stored"),
        ("ndarray:uint32:2", np.zeros(3, np.uint32), r"expected shape \(2,\), got \(3,\)"),
        ("ndarray:uint32", [1, 2], "expected ndarray, got list"),
        ("uint64", -1, "-1 is not between 0 and 18446744073709551615"),
        ("uint64", 3.7, "expected a whole number, got 3.7"),
        ("int", 2**63, "9223372036854775808 is not between"),
        ("int", "3", "expected a whole number, got '3'"),
        ("float32", [1.0, 2.0], "expected Real, got list"),
        ("str", b"x", "expected str, got bytes"),
        ("str", "\ud800", "surrogates not allowed"),
    ],
)
def test_a_value_that_would_not_come_back_as_it_is_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_encoding(name, "here").encode(value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ndarray", "07" + "0401" + "00", "7 is no dtype code"),
        ("ndarray:uint32", "0403" + "0000", r"2 bytes are no uint32 array of shape \(3,\)"),
        ("ndarray:uint32", "0400", r"\(0,\) is no shape of a stored array"),
        ("ndarray:uint32", "00" + "01000000", r"\(\) is no shape of a stored array"),
        ("ndarray:uint8", "0b" + "ff" * 16, "bytes are no uint8 array of shape"),
        ("str", "ff", "can't decode byte 0xff"),
        ("json", "7b", "Expecting property name"),
        ("uint64", "00", "buffer is smaller than requested"),
    ],
)
def test_bytes_that_are_no_value_are_refused(name: str, data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_encoding(name, "here").decode(memoryview(bytes.fromhex(data)))


@pytest.mark.parametrize("name", ["str", "int", "float16", "ndarray:uint32:2,3"])
def test_an_encoding_can_be_sent_to_another_process(name: str) -> None:
    assert pickle.loads(pickle.dumps(parse_encoding(name, "here"))).name == name
