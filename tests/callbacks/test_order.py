"""Callbacks come in the order that they declare, however they are listed."""

from __future__ import annotations

import graphlib
import itertools

import pytest

from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
from nemo_prolong.callbacks.protocol import Callback, in_order
from nemo_prolong.callbacks.step_guard import StepGuard
from nemo_prolong.callbacks.step_metrics import StepMetrics
from nemo_prolong.callbacks.stop_signal import StopOnSignal
from nemo_prolong.callbacks.watchdog import HangWatchdog
from tests.support.fake_loop import FakeLoop

OF_A_STAGE = (StepGuard, StepMetrics, CheckpointWriter, StopOnSignal, HangWatchdog)


def test_a_step_is_judged_then_recorded_then_saved() -> None:
    for listed in itertools.permutations(OF_A_STAGE):
        callbacks = [kind.__new__(kind) for kind in listed]
        ordered = [type(callback) for callback in in_order(callbacks)]
        assert ordered[:3] == [StepGuard, StepMetrics, CheckpointWriter]
        assert set(ordered[3:]) == {StopOnSignal, HangWatchdog}


def test_callbacks_without_an_order_stay_as_they_are_listed() -> None:
    callbacks = [Callback() for _ in range(4)]
    assert in_order(callbacks) == callbacks


def test_callbacks_that_come_after_each_other_are_an_error() -> None:
    class One(Callback):
        pass

    class Other(Callback):
        after = (One,)

    One.after = (Other,)
    with pytest.raises(graphlib.CycleError):
        in_order([One(), Other()])


def test_a_callback_that_does_nothing_keeps_no_state_and_lets_steps_pass() -> None:
    callback = Callback()
    assert callback.state_dict() == {}
    assert callback.allows_step(FakeLoop(), 1.0) is True
