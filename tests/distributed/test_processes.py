"""Ranks that a process starts itself: they get their place and its signals, and their exit codes become its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launcher_variables import TORCHRUN, without_launcher

# What scripts/train.py does, without training. A rank does as its part of "behaviour" says and ends with that code.
PROGRAM = """\
import json, os, pathlib, signal, sys, time
from nemo_prolong.config.ending import clean_ending
from nemo_prolong.distributed.launched import take_place
from nemo_prolong.distributed.processes import run_ranks
here = pathlib.Path(__file__).parent
with clean_ending():
    place = take_place()
    if place is None:
        sys.exit(run_ranks(2))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: sys.exit(75 if number == signal.SIGUSR1 else 74))
    (here / f"rank{place.rank}.tmp").write_text(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))
    (here / f"rank{place.rank}.tmp").rename(here / f"rank{place.rank}")
    behaviour = json.loads((here / "behaviour").read_text())[place.rank]
    print("output of rank", place.rank)
    print("error of rank", place.rank, file=sys.stderr)
    if behaviour == "wait":
        sys.stdout.flush()
        time.sleep(60)
    elif behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(behaviour)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts the program with a behaviour for each rank."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*behaviour: int | str, **popen: Any) -> subprocess.Popen[str]:
        (tmp_path / "behaviour").write_text(json.dumps(behaviour))
        command = [sys.executable, "-X", "utf8", str(tmp_path / "program.py"), "name=a b"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": without_launcher()}
        started.append(subprocess.Popen(command, **{**streams, **popen}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(directory: Path) -> list[tuple[int, list[str], dict[str, str]]]:
    """Wait for both ranks; return process, arguments and environment of each."""
    files = [directory / f"rank{rank}" for rank in range(2)]
    wait_for(lambda: all(file.exists() for file in files))
    return [tuple(json.loads(file.read_text())) for file in files]


def is_alive(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_every_rank_runs_the_command_and_is_told_its_place(start, tmp_path):
    process = start(0, 0)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(stdout.splitlines()) == ["output of rank 0", "output of rank 1"]
    assert sorted(stderr.splitlines()) == ["error of rank 0", "error of rank 1"]
    environments = []
    for rank, (_, arguments, environment) in enumerate(ranks_of(tmp_path)):
        assert arguments == ["name=a b"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["OMP_NUM_THREADS"] == "1"
        environments.append({name: environment[name] for name in TORCHRUN if name in environment})
    same = [{k: v for k, v in each.items() if "RANK" not in k} for each in environments]
    assert same[0] == same[1]
    assert (same[0]["WORLD_SIZE"], same[0]["LOCAL_WORLD_SIZE"], same[0]["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")


@pytest.mark.parametrize(("behaviour", "code"), [((75, 75), 75), ((0, 4), 4), ((0, "die"), 137)])
def test_the_code_of_a_rank_becomes_that_of_the_command(behaviour, code, start):
    assert start(*behaviour).wait(60) == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 74)])
def test_a_request_to_stop_reaches_every_rank(number, code, start, tmp_path):
    process = start("wait", "wait")
    ranks = ranks_of(tmp_path)
    process.send_signal(number)
    assert process.wait(60) == code
    assert not any(is_alive(pid) for pid, *_ in ranks)


def test_ctrl_c_ends_the_ranks_once_and_says_so_once(start, tmp_path):
    # The terminal sends it to all processes of the command's group.
    process = start("wait", "wait", start_new_session=True)
    ranks = ranks_of(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines().count("interrupted") == 1 and "Traceback" not in stderr
    assert not any(is_alive(pid) for pid, *_ in ranks)


def test_ranks_die_with_the_process_that_started_them(start, tmp_path):
    process = start("wait", "wait")
    ranks = ranks_of(tmp_path)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid, *_ in ranks))
