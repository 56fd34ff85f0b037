"""Where output goes: ours to the console, everything else to the run's log file.

NeMo, Lightning, Megatron and their C++ parts print hundreds of lines on import. They are kept in ``train.log``,
together with our own lines, and stay off the console. Secrets are taken out of every logged line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from nemo_prolong.redaction import redact

_CONSOLE_FORMAT = "%(asctime)s  %(message)s"
_FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def run_logging(log_file: Path, *, console: bool) -> Iterator[None]:
    """Send file descriptors 1 and 2 to ``log_file`` while the context is open.

    Working on descriptors catches C++ code and child processes too. An exception leaves the context with both restored,
    so its traceback reaches the console.

    Args:
        log_file: File to append to; its directory exists.
        console: Whether our own log lines also go to the console; true on rank 0.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    # A console of another encoding shows what it cannot show as an escape. The file is UTF-8 everywhere.
    escapes = "backslashreplace"
    with (
        log_file.open("a", buffering=1, encoding="utf-8", errors=escapes) as file,
        os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=escapes) as terminal,
    ):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        handlers = _install_handlers(file, terminal if console else None)
        try:
            yield
        finally:
            for logger, handler in handlers:
                logger.removeHandler(handler)
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for descriptor in saved:
                os.close(descriptor)


@contextlib.contextmanager
def console_logging() -> Iterator[None]:
    """Print our own log lines on stderr while the context is open, above a progress bar where one is drawn."""
    ours, handler = logging.getLogger("nemo_prolong"), _StderrHandler()
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)


class _RedactingFormatter(logging.Formatter):
    """A record as text, without secrets; tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines of a record."""
        return redact(super().format(record))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever ``sys.stderr`` is at the moment: a progress bar puts itself in its place."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_RedactingFormatter(_CONSOLE_FORMAT, datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.setStream(sys.stderr)
        super().emit(record)


def _install_handlers(file: TextIO, terminal: TextIO | None) -> list[tuple[logging.Logger, logging.Handler]]:
    """Attach the file to the root logger and the console to ours."""
    root, ours = logging.getLogger(), logging.getLogger("nemo_prolong")
    handlers: list[tuple[logging.Logger, logging.Handler]] = [(root, _handler(file, _FILE_FORMAT))]
    if terminal is not None:
        handlers.append((ours, _handler(terminal, _CONSOLE_FORMAT)))
    for logger, handler in handlers:
        logger.addHandler(handler)
    root.setLevel(logging.INFO)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    return handlers


def _handler(stream: TextIO, line_format: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_RedactingFormatter(line_format, datefmt="%H:%M:%S"))
    return handler
