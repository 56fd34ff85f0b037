"""The watchdog ends its process, whatever it hangs on."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_prolong.callbacks import watchdog
from nemo_prolong.errors import EXIT_HUNG
from nemo_prolong.records.run_directory import RunDirectory


def exit_code_of_a_hang(run_dir: Path) -> int:
    """Hang in a fork of this process."""
    child = os.fork()
    if not child:
        watchdog.HangWatchdog(0.1, RunDirectory(run_dir)).on_train_start(SimpleNamespace(step=7, rank=3))
        time.sleep(20)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_without_progress_writes_stacks_and_ends(tmp_path: Path) -> None:
    assert exit_code_of_a_hang(tmp_path) == EXIT_HUNG
    assert "exit_code_of_a_hang" in (tmp_path / "stacks.rank3.txt").read_text()
    event = (tmp_path / "events.jsonl").read_text()
    assert '"step": 7, "event": "hang", "detail": "rank 3 made no progress for 0.1 s;' in event


def test_of_ranks_that_hang_together_one_records_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    dogs = [watchdog.HangWatchdog(9.0, run) for _ in range(3)]
    for rank, dog in enumerate(dogs):
        dog._rank = rank
        dog._report()
    assert [event.detail.split(" s;")[0] for event in run.events().records] == ["rank 0 made no progress for 9"]
    assert sorted(file.name for file in tmp_path.glob("stacks.*")) == [f"stacks.rank{rank}.txt" for rank in range(3)]
    assert run.hang_file.read_text() == "rank 0 made no progress for 9 s; its stacks are in stacks.rank0.txt\n"


@pytest.mark.parametrize(("rank", "is_recorded"), [(0, True), (1, False)])
def test_rank_zero_forgets_the_hang_of_an_earlier_start(tmp_path: Path, rank: int, is_recorded: bool) -> None:
    run = RunDirectory(tmp_path)
    run.hang_file.write_text("rank 5 made no progress\n")
    dog = watchdog.HangWatchdog(3600.0, run)
    dog.on_train_start(SimpleNamespace(step=0, rank=rank))
    dog.on_train_end(SimpleNamespace())
    dog._report()
    assert bool(run.events().records) == is_recorded


def test_a_file_system_that_hangs_does_not_keep_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "record_event", lambda *args: time.sleep(20))
    monkeypatch.setattr(watchdog, "_REPORT_SECONDS", 0.2)
    assert exit_code_of_a_hang(tmp_path) == EXIT_HUNG


def test_a_report_that_fails_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "stacks.rank3.txt").mkdir()
    assert exit_code_of_a_hang(tmp_path) == EXIT_HUNG


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


class Waits:
    """Stands for the event that ends the watch. Each wait moves the clock, and the last ones say that it ended."""

    def __init__(self, clock: Clock, *passing: float) -> None:
        self.clock = clock
        self.passing = list(passing)
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        if not self.passing:
            return True
        self.clock.now += self.passing.pop(0)
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which a watchdog would have ended its process."""
    steps: list[int] = []
    monkeypatch.setattr(watchdog.HangWatchdog, "_give_up", lambda dog: steps.append(dog._step))
    return steps


def watch(dog: watchdog.HangWatchdog, waits: Waits, hang_seconds: float = 8.0) -> list[float]:
    """Watch until the waits are over, and return how long each was."""
    dog._watch(waits, hang_seconds)  # type: ignore[arg-type]
    return waits.waited


def test_a_process_is_ended_after_more_than_the_time(tmp_path: Path, clock: Clock, given_up: list[int]) -> None:
    dog = watchdog.HangWatchdog(8.0, RunDirectory(tmp_path))
    clock.now += 50.0
    dog._progress(3)
    watch(dog, Waits(clock, 4.0, 4.0))
    assert given_up == []
    watch(dog, Waits(clock, 0.5))
    assert given_up == [3]


def test_the_time_starts_when_the_watchdog_is_made(tmp_path: Path, clock: Clock, given_up: list[int]) -> None:
    dog = watchdog.HangWatchdog(8.0, RunDirectory(tmp_path))
    watch(dog, Waits(clock, 8.0))
    assert given_up == []
    watch(dog, Waits(clock, 0.5))
    assert given_up == [0]


def test_steps_and_parts_of_a_validation_are_progress(tmp_path: Path, clock: Clock, given_up: list[int]) -> None:
    dog = watchdog.HangWatchdog(8.0, RunDirectory(tmp_path))
    clock.now += 7.0
    dog.on_step_end(SimpleNamespace(step=4))
    watch(dog, Waits(clock, 7.0))
    dog.on_validation_batch_end(SimpleNamespace(step=99))
    watch(dog, Waits(clock, 7.0))
    assert given_up == []
    watch(dog, Waits(clock, 2.0))
    assert given_up == [4]


def test_it_looks_every_second_or_four_times_in_the_time(tmp_path: Path, clock: Clock, given_up: list[int]) -> None:
    dog = watchdog.HangWatchdog(8.0, RunDirectory(tmp_path))
    assert watch(dog, Waits(clock), hang_seconds=1800.0) == [1.0]
    assert watch(dog, Waits(clock), hang_seconds=0.5) == [0.125]


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hang watchdog"]


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_the_watch_ends_with_the_training(tmp_path: Path, end: str) -> None:
    dog = watchdog.HangWatchdog(3600.0, RunDirectory(tmp_path))
    dog.on_train_start(SimpleNamespace(step=0, rank=0))
    (thread,) = watching()
    # One that is not ended must not keep the process.
    assert thread.daemon
    getattr(dog, end)(SimpleNamespace())
    thread.join(5)
    assert watching() == []


def test_without_a_time_nothing_is_watched(tmp_path: Path) -> None:
    dog = watchdog.HangWatchdog(None, RunDirectory(tmp_path))
    dog.on_train_start(SimpleNamespace(step=0, rank=0))
    assert watching() == []
    dog.on_train_end(SimpleNamespace())
    dog.on_exception(SimpleNamespace())


def test_the_report_names_rank_time_and_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dog = watchdog.HangWatchdog(1800.0, RunDirectory(tmp_path))
    dog._report()
    message = "rank 0 made no progress for 1800 s; its stacks are in stacks.rank0.txt"
    assert caplog.messages == [message]
    (event,) = RunDirectory(tmp_path).events().records
    assert (event.step, event.event, event.detail) == (0, "hang", message)
