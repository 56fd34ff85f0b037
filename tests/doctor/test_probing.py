"""A part of the machine that hangs or fails is a finding, and nobody waits for it."""

import os
import sys
import threading
import time

import pytest

from nemo_prolong.doctor.finding import Level
from nemo_prolong.doctor.probing import Probe, ProbeError, run_command, values


def test_answers_come_by_name():
    probes = [Probe("one", "the first", lambda: 1), Probe("two", "the second", lambda: None)]
    assert values(probes, time.monotonic() + 10) == ({"one": 1, "two": None}, [])


def test_a_file_system_that_never_answers_is_named(tmp_path):
    os.mkfifo(tmp_path / "stuck")
    probe = Probe("disk", "the file system of runs/stage2", (tmp_path / "stuck").read_text)
    try:
        _, (finding,) = values([probe], time.monotonic() + 0.05)
        assert (finding.name, finding.level) == ("disk", Level.NO_GO)
        assert finding.what == "the file system of runs/stage2 gave no answer within 0 s."
        assert finding.why == "The stage would hang or fail at the same place."
        assert finding.remedy.startswith("Look at the driver or the file system of this node (dmesg, mount)")
        assert probe.is_stuck
    finally:
        (tmp_path / "stuck").write_text("")


def test_one_that_hangs_takes_no_time_from_the_others():
    release = threading.Event()
    probes = [Probe("slow", "something", release.wait), Probe("fast", "another", lambda: 7)]
    found, problems = values(probes, time.monotonic() + 0.05)
    release.set()
    assert (found, [problem.name for problem in problems]) == ({"slow": None, "fast": 7}, ["slow"])


def test_one_that_fails_is_a_finding_with_the_reason():
    def read():
        raise PermissionError("not for you")

    _, (finding,) = values([Probe("limits", "the limits", read)], time.monotonic() + 10)
    assert finding.what == "the limits cannot be read (not for you)."


def test_what_a_stage_can_do_without_is_a_warning():
    _, (finding,) = values([Probe("nvlink", "nvidia-smi nvlink", lambda: 1 // 0, vital=False)], time.monotonic() + 10)
    assert (finding.level, finding.why) == (Level.WARNING, "What it would show is not looked at.")


def test_a_program_that_does_not_exist_is_none():
    assert run_command(["no-such-program-anywhere"]) is None


def test_a_program_that_fails_is_quoted():
    with pytest.raises(ProbeError) as error:
        run_command(["sh", "-c", "echo 'Driver/library version mismatch'; exit 18"])
    assert str(error.value) == "sh ended with 18: Driver/library version mismatch"


def test_a_program_that_hangs_is_ended():
    with pytest.raises(ProbeError, match=r"did not end within 0\.2 s"):
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)
