"""Ctrl-C ends a preparation at once, with its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_prolong.errors import EXIT_INTERRUPTED


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(process: str) -> bool:
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("at_work", [2, 0])
def test_ctrl_c_ends_all_processes_without_a_traceback(tmp_path: Path, at_work: int) -> None:
    command = [sys.executable, "-m", "tests.data.preparation.interrupt_program", str(tmp_path)]
    # A terminal sends Ctrl-C to the whole group.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # While they work, and while they still import what they need.
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2 if at_work else len(children.read_text().split()) >= 3)
    started = children.read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, printed) == (EXIT_INTERRUPTED, "interrupted\n")
    wait_until(lambda: all(map(is_gone, started)))


def test_ctrl_c_while_processes_are_started_ends_them_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.data.preparation.interrupt_program", str(tmp_path), "itself"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "interrupted\n")
