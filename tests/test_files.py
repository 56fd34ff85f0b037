"""Files that are whole or not there: lines, atomic writes, published directories."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
from pathlib import Path

import pytest

from nemo_prolong.files import (
    append_line,
    digest_file,
    publish,
    restore_replaced,
    write_bytes_atomically,
    write_json_atomically,
)


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


def test_a_written_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "record.json"
    write_json_atomically(path, {"step": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json_atomically(path, {"step": 2})
    assert path.read_text() == '{\n  "step": 1\n}\n' and list(path.parent.iterdir()) == [path]


def test_a_digest_is_that_of_the_content(tmp_path: Path) -> None:
    write_bytes_atomically(tmp_path / "file", b"abc")
    assert digest_file(tmp_path / "file") == (hashlib.sha256(b"abc").hexdigest(), 3)


def directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_published_directory_replaces_the_one_before(tmp_path: Path) -> None:
    final = directory(tmp_path / "final", "old")
    publish(directory(tmp_path / "made", "new"), final, replaced=tmp_path / "replaced")
    assert (final / "file").read_text() == "new" and sorted(tmp_path.iterdir()) == [final]


def test_a_directory_is_not_replaced_unasked(tmp_path: Path) -> None:
    final = directory(tmp_path / "final", "old")
    with pytest.raises(OSError, match="not empty"):
        publish(directory(tmp_path / "made", "new"), final)
    assert (final / "file").read_text() == "old"


def test_a_kill_between_the_renames_is_undone(tmp_path: Path) -> None:
    replaced, final = directory(tmp_path / "replaced", "old"), tmp_path / "final"
    restore_replaced(final, replaced)
    assert (final / "file").read_text() == "old" and not replaced.exists()
    restore_replaced(final, directory(replaced, "older"))
    assert (final / "file").read_text() == "old" and replaced.exists()
