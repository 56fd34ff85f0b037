"""A signal stops training at the end of the step, with its state saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_prolong.callbacks.stop_signal import STOP_SIGNALS, StopOnSignal
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fake_loop import FakeLoop

pytestmark = pytest.mark.usefixtures("one_rank")


class FakeWriter:
    """Notes which steps it was asked to save."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save_before_stop(self, loop: FakeLoop) -> None:
        self.saved.append(loop.step)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """The handlers of before, which are there again afterwards."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def writer() -> FakeWriter:
    return FakeWriter()


@pytest.fixture
def stop(writer: FakeWriter, run: RunDirectory) -> StopOnSignal:
    return StopOnSignal(writer, run)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_and_stops_at_the_end_of_the_step(
    number: signal.Signals, stop: StopOnSignal, writer: FakeWriter, run: RunDirectory, caplog: Any
) -> None:
    loop = FakeLoop(step=4)
    stop.on_train_start(loop)
    os.kill(os.getpid(), number)
    assert not loop.stopped
    loop.step = 5
    stop.on_step_end(loop)
    assert loop.stopped and stop.stopped is True and writer.saved == [5]
    assert [(event.step, event.event, event.detail) for event in run.events().records] == [
        (5, "stopped_by_signal", "state saved")
    ]
    assert caplog.messages == [
        f"rank 0 received {number.name}",
        "stopped after step 5, as asked; the same command continues",
    ]


def test_without_a_signal_training_goes_on(stop: StopOnSignal, writer: FakeWriter, run: RunDirectory) -> None:
    loop = FakeLoop(step=5)
    stop.on_train_start(loop)
    stop.on_step_end(loop)
    assert not loop.stopped and stop.stopped is False and writer.saved == [] and run.events().records == []


def test_a_signal_in_the_last_step_lets_training_end(stop: StopOnSignal, writer: FakeWriter) -> None:
    loop = FakeLoop(step=100)
    stop.on_train_start(loop)
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_step_end(loop)
    assert not loop.stopped and not stop.stopped and writer.saved == []


def test_a_rank_stops_when_another_was_asked_to(
    stop: StopOnSignal, writer: FakeWriter, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("nemo_prolong.callbacks.stop_signal.agree_any", lambda flag: True)
    loop = FakeLoop(step=5, rank=1)
    stop.on_step_end(loop)
    assert loop.stopped and stop.stopped and writer.saved == [5]
    assert run.events().records == [] and caplog.messages == []


def test_signals_are_given_back_as_they_were(stop: StopOnSignal) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop.listen()
    # Whoever takes the signals in between does not change what was there at first.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop.on_train_start(FakeLoop())
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    # They are given back once.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_outside_of_the_main_thread_no_signal_is_taken(stop: StopOnSignal) -> None:
    errors: list[BaseException] = []

    def listen() -> None:
        try:
            stop.listen()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == []
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == [signal.SIG_IGN] * 2
