"""NaN and infinity are counted wherever they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.weights.hf_reader import count_non_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_NUMBERS = [float("nan"), float("inf"), float("-inf")]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    places=st.dictionaries(st.integers(0, 10**6), st.sampled_from(NO_NUMBERS), max_size=5),
)
def test_every_value_that_is_no_number_is_counted(
    dtype: torch.dtype, shape: tuple[int, int], places: dict[int, float]
) -> None:
    tensor = torch.linspace(-3, 3, shape[0] * shape[1]).to(dtype)
    expected = {place % len(tensor): value for place, value in places.items()}
    for place, value in expected.items():
        tensor[place] = value
    assert count_non_finite(tensor.view(shape)) == len(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_values_are_numbers(dtype: torch.dtype) -> None:
    assert count_non_finite(torch.full((1000, 3), torch.finfo(dtype).max, dtype=dtype)) == 0
