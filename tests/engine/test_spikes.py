"""Which steps are spikes."""

from __future__ import annotations

import math

import pytest

from nemo_prolong.callbacks.step_guard import SpikeDetector


def steady(detector: SpikeDetector, steps: int) -> None:
    for step in range(steps):
        assert detector.fault(2.0 + 0.1 * (step % 2), 1.0 + 0.2 * (step % 2)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_fault_from_the_first_step_on(value: float) -> None:
    assert SpikeDetector(None, 8).fault(value, 1.0) == f"loss is {value}"
    assert SpikeDetector(6.0, 8).fault(1.0, value) == f"grad norm is {value}"


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = SpikeDetector(6.0, 8)
    steady(detector, 7)
    assert detector.fault(50.0, 50.0) is None


def test_a_loss_or_norm_beyond_six_deviations_is_a_spike() -> None:
    detector = SpikeDetector(6.0, 8)
    steady(detector, 8)
    # Mean 2.05, deviation 0.05; mean 1.1, deviation 0.1.
    expected = "loss is 2.36, above 2.35: 6 standard deviations over the mean of the last 8 steps"
    assert detector.fault(2.36, 1.0) == detector.fault(2.36, 1.0) == expected
    assert (detector.fault(2.0, 1.71) or "").startswith("grad norm is 1.71, above 1.7:")
    assert detector.fault(2.34, 1.69) is None


def test_a_figure_at_the_limit_is_no_spike() -> None:
    detector = SpikeDetector(6.0, 2)
    # Mean 2, deviation 1, both exact.
    assert detector.fault(1.0, 1.0) is None and detector.fault(3.0, 3.0) is None
    assert detector.fault(8.0, 8.0) is None


def test_the_figures_of_a_spike_have_four_digits() -> None:
    detector = SpikeDetector(4 / 3, 3)
    for loss in (1.0, 2.0, 3.5):
        assert detector.fault(loss, 1.0) is None
    fault = "loss is 33.33, above 3.537: 1.33333 standard deviations over the mean of the last 3 steps"
    assert detector.fault(100 / 3, 1.0) == fault


def test_a_fall_is_no_spike() -> None:
    detector = SpikeDetector(6.0, 8)
    steady(detector, 8)
    assert detector.fault(0.1, 0.01) is None


def test_a_series_without_noise_leaves_one_percent() -> None:
    detector = SpikeDetector(6.0, 4)
    for _ in range(4):
        assert detector.fault(2.0, 1.0) is None
    assert detector.fault(2.11, 1.0) is None
    assert SpikeDetector(None, 4).fault(1e9, 1e9) is None
