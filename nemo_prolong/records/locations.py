"""Where the paths lie that a run recorded: as they were typed, or below the directory that the run was started in."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def working_directory() -> str:
    """Return the directory that relative paths of this process are below, to be recorded beside them."""
    return os.getcwd()


def recorded_path(path: str, started_in: str | None) -> Path:
    """Return where a recorded path lies, seen from here.

    A relative path that does not exist from here is looked for below the directory that the run was started in. It is
    returned as it was recorded where neither exists, so that a message names what was typed.

    Args:
        path: As it was typed.
        started_in: Working directory of the run, None where an earlier version did not record it.
    """
    typed = Path(path)
    if typed.is_absolute() or started_in is None or typed.exists():
        return typed
    there = Path(started_in, path)
    if not there.exists():
        return typed
    log.info("%s is not below %s; %s is used, where the run was started", path, working_directory(), there)
    return there
