"""The watchdog ends its process, whatever it hangs on."""

from __future__ import annotations

import os
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


def test_a_file_system_that_hangs_does_not_keep_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "record_event", lambda *args: time.sleep(20))
    monkeypatch.setattr(watchdog, "_REPORT_SECONDS", 0.2)
    assert exit_code_of_a_hang(tmp_path) == EXIT_HUNG


def test_a_report_that_fails_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "stacks.rank3.txt").mkdir()
    assert exit_code_of_a_hang(tmp_path) == EXIT_HUNG
