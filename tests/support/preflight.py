"""The start of a stage as a test looks at it: what is on disk, before anything is trained."""

from __future__ import annotations

import pytest

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ProlongError
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.stages.preflight import Start, check_files


def start_of(cfg: RunConfig, rank: int = 0) -> Start:
    """Look at what is on disk, as the start of a stage does."""
    return check_files(cfg, RunDirectory(cfg.run_dir), rank)


def refusal(kind: type[ProlongError], cfg: RunConfig, rank: int = 0) -> str:
    """Return the message that ``cfg`` is refused with."""
    with pytest.raises(kind) as error:
        start_of(cfg, rank)
    # Not a subclass: the class decides the exit code.
    assert type(error.value) is kind
    return str(error.value)
