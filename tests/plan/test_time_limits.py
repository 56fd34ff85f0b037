"""The time limits of a stage follow from one step time, and limits set by hand that contradict it are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.plan.time_limits import (
    TimeLimits,
    check_time_limits,
    planned_save_seconds,
    planned_step_seconds,
    time_limits,
    with_job_limits,
)
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import StepRecord

EXPERIMENTS = ("stage1", "stage2", "sft", "mini/base", "mini/stage1", "mini/stage2", "mini/sft")


@cache
def config(experiment: str, *overrides: str) -> RunConfig:
    parent = [] if experiment == "mini/base" else ["parent=runs/parent"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load(compose("train", [f"+exp={experiment}", *parent, *overrides]), RunConfig)


def measured_run(directory: Path, step_seconds: list[float]) -> RunDirectory:
    """Return the directory of a run whose steps took so long."""
    run = RunDirectory(directory / "measured")
    run.path.mkdir(parents=True)
    for number, seconds in enumerate(step_seconds, start=1):
        run.append_metrics(
            StepRecord(step=number, loss=1.0, real_tokens=1, consumed_train_tokens=number, step_seconds=seconds)
        )
    return run


def assert_in_order(limits: TimeLimits) -> None:
    step, save = limits.step_seconds, limits.save_seconds
    assert limits.group_timeout_seconds > limits.hang_seconds > 3 * step + save
    assert limits.signal_seconds >= step + save


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_limits_never_contradict_each_other(experiment: str) -> None:
    cfg = config(experiment)
    for ranks in (1, 8, 64, 512):
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "an unknown one", None):
            assert_in_order(time_limits(cfg, ranks, device_name=device))


@pytest.mark.parametrize(("experiment", "known_seconds"), [("stage1", 42.0), ("stage2", 86.0), ("sft", 42.0)])
def test_a_step_is_planned_longer_than_steps_are(experiment: str, known_seconds: float) -> None:
    # At 1,560 (stage 1) and 1,525 (stage 2) tokens per second and GPU, the slowest by arithmetic of kernels.
    planned = planned_step_seconds(config(experiment), 64)
    assert known_seconds < planned < 6 * known_seconds


def test_a_step_on_fewer_ranks_or_slower_ones_is_longer() -> None:
    cfg = config("stage2")
    assert planned_step_seconds(cfg, 8) == pytest.approx(8 * planned_step_seconds(cfg, 64))
    slower = planned_step_seconds(cfg, 64, "NVIDIA A100-SXM4-80GB")
    assert slower == pytest.approx(planned_step_seconds(cfg, 64) * 989.4 / 312)
    assert planned_step_seconds(cfg, 64, None) > 1000 * slower
    assert planned_step_seconds(config("stage2", "faults.planned_step_seconds=77"), 8) == 77.0


def test_a_save_of_8b_parameters_takes_minutes() -> None:
    # 14 bytes of 8.03e9 parameters at 1e9 bytes a second, and a 64th of them hashed.
    assert planned_save_seconds(config("stage2"), 64) == pytest.approx(112.4 + 4.1, abs=0.2)
    assert planned_save_seconds(config("stage2"), 8) == pytest.approx(112.4 + 32.7, abs=0.2)
    assert planned_save_seconds(config("mini/base"), 1) < 1


def test_short_steps_keep_the_least_limits() -> None:
    limits = time_limits(config("mini/stage2"), 1, device_name=None)
    assert (limits.signal_seconds, limits.hang_seconds, limits.group_timeout_seconds) == (120, 1800, 1920)


def test_what_is_set_by_hand_is_kept() -> None:
    cfg = config("stage2", "faults.hang_seconds=9999", "cluster.signal_seconds=888")
    limits = time_limits(cfg, 64)
    assert (limits.hang_seconds, limits.signal_seconds, limits.group_timeout_seconds) == (9999, 888, 10119)
    check_time_limits(cfg, limits)
    applied = limits.apply_to(config("stage2"))
    assert (applied.faults.hang_seconds, applied.cluster.signal_seconds) == (9999, 888)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "faults.hang_seconds=446.5",
            "faults.hang_seconds=446.5: a step is planned at 1m50s and a save at 1m57s, and ranks that are well may "
            "need three steps and a save. Set faults.hang_seconds=1800, or null to have it follow from them. If steps "
            "are shorter than planned, say so with faults.planned_step_seconds.",
        ),
        (
            "cluster.signal_seconds=226",
            "cluster.signal_seconds=226: a step is planned at 1m50s and a save at 1m57s, and the signal is noticed at "
            "the end of a step. Set cluster.signal_seconds=344, or null to have it follow from them. If steps are "
            "shorter than planned, say so with faults.planned_step_seconds.",
        ),
    ],
)
def test_limits_that_contradict_a_step_are_refused_with_what_fits(override: str, message: str) -> None:
    cfg = config("stage2", "faults.planned_step_seconds=110", override)
    with pytest.raises(ConfigError) as refusal:
        check_time_limits(cfg, time_limits(cfg, 64))
    assert str(refusal.value) == message
    for fitting in ("faults.hang_seconds=447", "cluster.signal_seconds=227"):
        cfg = config("stage2", "faults.planned_step_seconds=110", fitting)
        check_time_limits(cfg, time_limits(cfg, 64))


def test_measured_steps_replace_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "has_manifest", True)
    monkeypatch.setattr(RunDirectory, "manifest", type("Manifest", (), {"world_size": 64}))
    cfg = config("stage2")
    # The longest of the last 500 counts; one before them does not.
    run = measured_run(tmp_path, [9000.0, *[50.0] * 498, 70.0, 60.0])
    limits = time_limits(cfg, 64, run)
    assert limits.measured and limits.step_seconds == 70.0
    assert "a step is measured at 1m10s at most" in limits.sentence()
    assert_in_order(limits)
    assert time_limits(cfg, 8, run).step_seconds == 560.0
    assert_in_order(time_limits(cfg, 8, run))
    short = config("stage2", "faults.hang_seconds=1000")
    with pytest.raises(ConfigError, match=r"a step is measured at 9m20s .* to have it follow from them\.$"):
        check_time_limits(short, time_limits(short, 8, run))


def test_a_few_measured_steps_are_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDirectory, "has_manifest", True)
    limits = time_limits(config("stage2"), 64, measured_run(tmp_path, [1.0] * 99))
    assert not limits.measured
    assert limits == time_limits(config("stage2"), 64)


def test_a_job_carries_numbers_that_fit_it(tmp_path: Path) -> None:
    cfg = with_job_limits(config("stage2"), RunDirectory(tmp_path / "none"))
    limits = time_limits(config("stage2"), 64)
    assert (cfg.cluster.signal_seconds, cfg.faults.hang_seconds) == (limits.signal_seconds, limits.hang_seconds)
    assert limits.signal_seconds > 300


def test_a_job_too_short_for_its_own_save_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "none")
    step = "faults.planned_step_seconds=110"
    with pytest.raises(ConfigError) as refusal:
        with_job_limits(config("stage2", step, "cluster.time_limit=00:17:00"), run)
    assert str(refusal.value) == (
        "cluster.time_limit=00:17:00: a job needs 10m00s to start, 1m50s for a step, and is asked to stop 5m44s before "
        "its end. Set cluster.time_limit=00:18:00 or longer, or say with faults.planned_step_seconds how long a step "
        "takes."
    )
    with_job_limits(config("stage2", step, "cluster.time_limit=00:18:00"), run)


def test_a_stop_that_slurm_cannot_announce_so_early_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"and Slurm asks 65535 s before at most\. Plan more ranks"):
        with_job_limits(config("stage2", "faults.planned_step_seconds=66000"), RunDirectory(tmp_path / "none"))


@pytest.mark.parametrize("target", ["kubernetes", "docker", "local"])
def test_a_time_limit_concerns_slurm_alone(tmp_path: Path, target: str) -> None:
    short = ["faults.planned_step_seconds=110", "cluster.time_limit=00:17:00", f"launch.target={target}"]
    cfg = with_job_limits(config("stage2", *short), RunDirectory(tmp_path / "none"))
    assert cfg.cluster.signal_seconds == 344
