"""Lines that are appended whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

from nemo_prolong.files import append_line


def test_lines_are_appended_in_their_order(tmp_path: Path) -> None:
    for line in ("one", "zw\u00f6lf"):
        append_line(tmp_path / "lines", line)
    assert (tmp_path / "lines").read_text(encoding="utf-8") == "one\nzw\u00f6lf\n"


def test_of_a_line_that_does_not_fit_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "whole")
    child = os.fork()
    if not child:
        # The kernel writes what fits, and says so at the next byte, as on a disk that becomes full.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        try:
            append_line(path, "too long")
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert path.read_text() == "whole\n"
