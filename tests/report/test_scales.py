from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.report.scales import Scale, log_ticks, round_ticks, token_ticks

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(low=finite, extent=st.floats(1e-3, 1e6), at_most=st.integers(4, 12))
def test_ticks_are_evenly_spaced_and_not_too_many(low, extent, at_most):
    high = low + extent
    ticks = round_ticks(low, high, at_most)
    assert 1 <= len(ticks) <= at_most + 1
    assert all(low - 1e-6 * extent <= tick <= high + 1e-6 * extent for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-6, abs=1e-9) for step in steps)


@given(low=st.floats(0.1, 1e4), ratio=st.floats(10.0, 1e6))
def test_logarithmic_ticks_are_round_and_inside_the_range(low, ratio):
    ticks = log_ticks(low, low * ratio, at_most=8)
    assert ticks == sorted(ticks)
    assert all(low * (1 - 1e-6) <= tick <= low * ratio * (1 + 1e-6) for tick in ticks)
    assert all(f"{tick:.0e}"[0] in "1235" for tick in ticks)


def test_a_logarithmic_axis_of_a_narrow_range_has_ticks():
    assert log_ticks(1.1, 4.6, at_most=8) == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]


@pytest.mark.parametrize(
    ("high", "labels"),
    [
        (1_950_000, ["0", "0.5M", "1M", "1.5M"]),
        (40 * 2**30, ["0", "10B", "20B", "30B", "40B"]),
        (700 * 2**10, ["0", "200K", "400K", "600K"]),
        (900, ["0", "200", "400", "600", "800"]),
    ],
)
def test_token_ticks_are_round_in_the_binary_unit_that_fits(high, labels):
    ticks = token_ticks(high, at_most=5)
    assert [label for _, label in ticks] == labels
    assert all(0 <= value <= high for value, _ in ticks)


def test_a_scale_maps_its_ends_to_its_pixels():
    linear = Scale(2, 4, 100, 0, ())
    assert [linear(2), linear(3), linear(4)] == [100, 50, 0]
    log = Scale(1, 100, 0, 200, (), log=True)
    assert [log(1), log(10), log(100)] == pytest.approx([0, 100, 200])
