"""A stage refuses time limits that contradict what is planned, and warns of those that contradict what was measured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.plan import time_limits
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.stages import run as stage_run

SHORT = {"hang_seconds": 300.0}


def test_a_planned_step_that_looks_like_a_hang_is_refused(make_config: Callable[..., RunConfig]) -> None:
    cfg = make_config(faults={**SHORT, "planned_step_seconds": 100.0})
    with pytest.raises(ConfigError) as refusal:
        stage_run.run_stage(cfg, [])
    assert str(refusal.value) == (
        "faults.hang_seconds=300: a step is planned at 1m40s and a save at 0s, and ranks that are well may need three "
        "steps and a save. Set faults.hang_seconds=1800, or null to have it follow from them. If steps are shorter "
        "than planned, say so with faults.planned_step_seconds."
    )
    assert not Path(cfg.run_dir).exists()


def test_a_run_goes_on_with_limits_that_its_steps_contradict(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(time_limits, "measured_step_seconds", lambda run, world_size: 100.0)
    cfg = make_config(faults=SHORT)
    limits = stage_run._time_limits(cfg, RunDirectory(cfg.run_dir), 1)
    assert limits.hang_seconds == 300.0 and limits.measured
    with caplog.at_level(logging.INFO):
        stage_run._announce_limits(cfg, limits)
    said, warned = caplog.records
    assert said.getMessage() == (
        "time limits: a step is measured at 1m40s at most and a save planned at 0s: asked to stop 120 s before the end "
        "of a job, hang after 300 s, process groups time out after 420 s"
    )
    assert warned.levelno == logging.WARNING
    assert warned.getMessage().startswith("faults.hang_seconds=300: a step is measured at 1m40s and a save at 0s")
