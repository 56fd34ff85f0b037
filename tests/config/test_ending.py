"""How a script ends when the user, the machine or the reader of its output ends it."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.findings import ConfigErrors
from nemo_prolong.distributed.ending import _packed, _unpacked
from nemo_prolong.errors import EXIT_INTERRUPTED, CheckpointError, ConfigError, DataError, ExportError, TrainingError

BEGIN = "from nemo_prolong.config.ending import clean_ending\nfrom nemo_prolong.errors import DataError\n"
SCRIPTS = CONFIG_DIR.parent / "scripts"


def run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose last lines are inside of ``clean_ending``."""
    program = f"{BEGIN}with clean_ending(DataError):\n    {body}\n"
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on device. Free some space, then run the same command again."),
        (errno.EACCES, "permission denied. Give yourself the permission, or name another place."),
        (errno.EROFS, "read-only file system. Name a place that can be written to."),
        (errno.ENOTDIR, "not a directory. Move it away, or name another place."),
        (errno.ENAMETOOLONG, "file name too long. Choose a shorter name."),
    ],
)
def test_what_the_system_refuses_has_a_remedy_and_a_code(number: int, message: str) -> None:
    done = run(f"import os; raise OSError({number}, os.strerror({number}), 'runs/a')")
    assert (done.returncode, done.stderr) == (DataError.exit_code, f"runs/a: {message}\n")


def test_a_missing_file_is_a_bug_of_ours_and_keeps_its_traceback() -> None:
    done = run("open('/no/such/file')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_interrupt_ends_with_130_and_no_traceback() -> None:
    done = run("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "interrupted\n")


def test_an_interrupt_that_python_drops_is_raised_later() -> None:
    body = "import os, signal; from nemo_prolong.config.ending import raise_if_interrupted as raise_later\n"
    body += "    class Deleted: __del__ = lambda self: os.kill(os.getpid(), signal.SIGINT)\n"
    body += "    Deleted(); raise_later(); print('went on')"
    done = run(body)
    assert (done.returncode, done.stdout) == (EXIT_INTERRUPTED, "")
    assert "Exception ignored" in done.stderr and done.stderr.endswith("interrupted\n")


def test_only_the_first_rank_prints_and_all_have_the_code() -> None:
    done = run("raise DataError('a', 'b.', 'c.')", RANK="1")
    assert (done.returncode, done.stderr) == (DataError.exit_code, "")


def test_a_message_cannot_control_the_terminal() -> None:
    done = run(r"raise DataError('a\x1b[2J', 'b.', 'c.')")
    assert done.stderr == "a\\x1b[2J: b. c.\n"


def test_a_reader_that_leaves_early_is_no_mistake() -> None:
    program = f"{BEGIN}with clean_ending():\n    for _ in range(100000): print('x' * 100)\n"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGPIPE
        assert process.stderr.read() == b""


def test_a_console_of_another_encoding_shows_escapes() -> None:
    done = run("print('\\u65e5'); raise DataError('\\u65e5', 'b.', 'c.')", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("\\u65e5\n", "\\u65e5: b. c.\n")


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for script, typed in {"lineage.py": [f"{tmp_path}/file/x"], "watch.py": [f"{tmp_path}/file/x", "--once"]}.items():
        done = subprocess.run([sys.executable, SCRIPTS / script, *typed], capture_output=True, text=True)
        assert done.returncode == CheckpointError.exit_code and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, ExportError, TrainingError])
def test_an_error_is_the_same_on_another_rank_and_in_another_process(kind: type[DataError]) -> None:
    error = kind("a=1", "is wrong.", "Set a=2.")
    for copy in (_unpacked(_packed(error).encode()), pickle.loads(pickle.dumps(error))):
        assert (type(copy), str(copy), copy.exit_code) == (kind, "a=1: is wrong. Set a=2.", error.exit_code)


def test_several_findings_are_several_in_another_process_too() -> None:
    errors = ConfigErrors([ConfigError("a=1", "is wrong.", "Set a=2."), ConfigError("b=1", "is wrong.", "Set b=2.")])
    assert str(pickle.loads(pickle.dumps(errors))) == str(errors)
    told = _unpacked(_packed(errors).encode())
    assert (str(told), told.exit_code) == (str(errors), ConfigError.exit_code)
