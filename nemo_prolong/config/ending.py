"""How a script ends: a mistake of the user, Ctrl-C, a full disk and a closed pipe each end it without a traceback.

Every script of ``scripts/`` runs inside ``clean_ending``. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from nemo_prolong.errors import EXIT_INTERRUPTED, ProlongError
from nemo_prolong.redaction import redact
from nemo_prolong.text import escaped

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space, then run the same command again."),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "Give yourself the permission, or name another place."),
    errno.EROFS: "Name a place that can be written to.",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP), "Move it away, or name another place."),
    errno.ENAMETOOLONG: "Choose a shorter name.",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT), "Repair the file system, then repeat the command."),
}
"""What the user can do about an error of the operating system. Others are bugs, a file that is missing included."""


_interrupted = False
"""Whether Ctrl-C was pressed. Python drops the exception where it comes while an object is being deleted."""


@contextmanager
def clean_ending(os_errors: type[ProlongError] = ProlongError) -> Iterator[None]:
    """End the process with a message and the right exit code where the block raises what no bug is.

    Args:
        os_errors: Whose exit code a full disk, a missing permission and the like have here.

    Raises:
        SystemExit: With the exit code of a ``ProlongError``, or ``EXIT_INTERRUPTED`` for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A console of another encoding shows what it cannot show as an escape.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Where it is ignored, by nohup say, it stays so.
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
        sys.stdout.flush()
    except ProlongError as error:
        _exit(str(error), error.exit_code, error.of_one_rank)
    except KeyboardInterrupt:
        _exit("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        end_with_the_reader()
        os.kill(os.getpid(), signal.SIGPIPE)
    except OSError as error:
        explained = explained_os_error(error, os_errors)
        if explained is None:
            raise
        _exit(str(explained), explained.exit_code)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raise what Ctrl-C raised and Python dropped, as it may in the seconds in which NeMo is imported.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed since the script began.
    """
    if _interrupted:
        raise KeyboardInterrupt


def end_with_the_reader() -> None:
    """Let a reader such as ``head`` close the pipe early, which is no mistake."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def explained_os_error(error: OSError, kind: type[ProlongError]) -> ProlongError | None:
    """Return an error of the operating system in the words of this project, or None where it is a bug of ours.

    Args:
        error: What was raised.
        kind: Whose exit code it has.
    """
    if error.errno not in _REMEDIES:
        return None
    reason = os.strerror(error.errno)
    return kind(str(error.filename or "output"), f"{reason[0].lower()}{reason[1:]}.", _REMEDIES[error.errno])


def _exit(message: str, code: int, any_rank: bool = False) -> NoReturn:
    """Print the message on the first rank, or on any, and exit every rank with the code."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if any_rank or not rank.isdigit() or int(rank) == 0:
        sys.stderr.write(f"{escaped(redact(message))}\n")
    sys.exit(code)
