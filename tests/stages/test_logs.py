"""Library output goes to the file, ours to both; seen from outside, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from nemo_prolong.logs import run_logging

print("before")
descriptors = sorted(os.listdir("/proc/self/fd"))
try:
    with run_logging(Path(sys.argv[1]), console=sys.argv[2] == "console"):
        print("printed by python")
        os.write(1, b"written to stdout\\n")
        os.write(2, b"written to stderr\\n")
        subprocess.run([sys.executable, "-S", "-c", "print('said by a child')"])
        logging.getLogger("nemo").info("info of a library")
        warnings.warn("warning of a library")
        logging.getLogger("nemo_prolong.engine").info("ours")
        sys.stdout.write("unfinished line")
        if sys.argv[3] == "fail":
            raise ValueError("a bug")
finally:
    logging.getLogger("nemo_prolong.engine").info("too late")
    print("after")
    os.write(1, b"after, to stdout\\n")
    os.write(2, b"after, to stderr\\n")
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
"""
LIBRARY_LINES = (
    "printed by python",
    "written to stdout",
    "written to stderr",
    "said by a child",
    "info of a library",
    "warning of a library",
    "unfinished line",
)
AFTER = ["after", "after, to stdout"]


@pytest.fixture
def run_program(tmp_path):
    """A function that runs the program and returns (process, text of the log file)."""

    def run(console: str, end: str) -> tuple[subprocess.CompletedProcess[str], str]:
        log_file = tmp_path / "train.log"
        command = [sys.executable, "-c", PROGRAM, str(log_file), console, end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done, log_file.read_text()

    return run


def lines(text: str) -> list[str]:
    """Return the lines, sorted: a pipe keeps Python's own text back until the end."""
    return sorted(text.splitlines())


def test_whatever_a_library_says_goes_to_the_file_only(run_program):
    done, logged = run_program("console", "end")
    assert done.returncode == 0, done.stderr
    for line in LIBRARY_LINES:
        assert line in logged
        assert line not in done.stdout + done.stderr
    # A warning is a line like the others, with its time.
    assert re.search(r"^\d\d:\d\d:\d\d WARNING py\.warnings: ", logged, re.MULTILINE)


def test_our_lines_have_the_time_on_screen_and_the_origin_in_files(run_program):
    done, logged = run_program("console", "end")
    ours = [line for line in done.stdout.splitlines() if line.endswith("ours")]
    assert len(ours) == 1 and re.fullmatch(r"\d\d:\d\d:\d\d  ours", ours[0])
    assert re.search(r"^\d\d:\d\d:\d\d INFO nemo_prolong\.engine: ours$", logged, re.MULTILINE)
    assert logged.count("ours") == 1
    assert lines(done.stdout) == sorted(["before", ours[0], *AFTER])
    assert done.stderr == "after, to stderr\n"


def test_a_rank_without_a_console_says_nothing_there(run_program):
    done, logged = run_program("silent", "end")
    assert lines(done.stdout) == sorted(["before", *AFTER])
    assert "INFO nemo_prolong.engine: ours" in logged


def test_an_exception_restores_the_descriptors_and_shows_its_traceback(run_program):
    done, logged = run_program("console", "fail")
    assert done.returncode == 1
    assert set(AFTER) <= set(done.stdout.splitlines())
    assert done.stderr.startswith("after, to stderr\nTraceback ") and done.stderr.endswith("ValueError: a bug\n")
    assert "Traceback" not in logged and "after" not in logged
    # What was said until then is in the file, not lost and not on the console.
    assert "unfinished line" in logged and "unfinished line" not in done.stdout


def test_the_context_once_left_takes_no_more_lines(run_program):
    done, logged = run_program("console", "end")
    assert "too late" not in logged + done.stdout


def test_a_second_run_appends_to_the_file(run_program):
    run_program("console", "end")
    _, logged = run_program("console", "end")
    assert logged.count("written to stdout") == 2


def test_a_log_that_cannot_be_opened_changes_no_descriptor(tmp_path):
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom nemo_prolong.logs import run_logging\n"
        "try:\n    with run_logging(Path(sys.argv[1]), console=True):\n        pass\n"
        "except FileNotFoundError:\n    os.write(1, b'still here')\n"
    )
    missing = str(tmp_path / "missing" / "train.log")
    done = subprocess.run([sys.executable, "-c", program, missing], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("still here", "")
    assert not Path(missing).parent.exists()
