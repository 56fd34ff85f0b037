"""How long a step and a save take at most, and the limits that follow from these two numbers.

The step is planned from FLOPs until the run's own log has enough steps, and measured after that. Nothing else is
chosen. A limit that is set by hand must not contradict them.

========================  ==============================================================================
limit                     is longer than
========================  ==============================================================================
asked to stop             a step and a save: the signal is noticed at the end of a step
hang                      three steps and a save: a rank that is well may be that slow once
timeout of the groups     hang: NCCL would end a rank before it has written where it stands
time of a job             its start, a step, and the time before its end at which it is asked to stop
========================  ==============================================================================
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nemo_prolong.config.schema import LaunchTarget, RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.plan.devices import dense_peak_flops_per_second
from nemo_prolong.plan.flops import training_flops_per_token
from nemo_prolong.plan.model_size import model_size
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import StepRecord
from nemo_prolong.units import format_seconds

PLANNED_MFU = 0.15
"""Share of the dense BF16 peak. Stage 2 reaches about this on H100s with attention that is not fused and deterministic,
and about twice it otherwise. Both are counted by ``plan.flops``."""

PLANNED_DEVICE = "NVIDIA H100 80GB HBM3"
"""Where a stage is planned for, and what an accelerator without a known peak is taken for."""

CPU_FLOPS_PER_SECOND = 10e9
"""Of a rank on a CPU. Two cores train the miniature at 45e9 a core; four ranks may share them."""

WRITE_BYTES_PER_SECOND = 1e9
"""Of all ranks together, to a shared file system that others use too. Parallel ones write ten times as much."""

HASH_BYTES_PER_SECOND = 0.4 * 2**30
"""Of one core, the least that docs/checkpoints.md measured."""

START_SECONDS = 600
"""From the start of a job to its first step: imports, a checkpoint of 104 GiB verified and read, kernels chosen."""

LEAST_HANG_SECONDS = 1800
"""A file system that stalls for minutes is no hang, however short the steps are."""

LEAST_SIGNAL_SECONDS = 120
"""However short a step and a save are, ranks need time to end and the job to be requeued."""

GROUP_MARGIN_SECONDS = 120
"""From the end of ``hang_seconds`` to the timeout of the groups. The watchdog takes up to 31 seconds of it."""

_MEASURED_STEPS = 500
_LEAST_MEASURED_STEPS = 100
"""Fewer steps may have had short documents only."""

_MOST_SIGNAL_SECONDS = 65535
"""Slurm takes no more."""

_ADAM_BYTES = 12
"""Of a parameter: fp32 weight and two moments."""


class TimeLimits(NamedTuple):
    """What follows for a stage.

    Attributes:
        step_seconds: Of the longest step.
        measured: Whether the step was measured; planned otherwise.
        save_seconds: From the beginning of a save to the complete checkpoint.
        signal_seconds: How long before the end of a job the stage is asked to stop.
        hang_seconds: Time without progress after which a rank ends itself.
    """

    step_seconds: float
    measured: bool
    save_seconds: float
    signal_seconds: int
    hang_seconds: float

    @property
    def group_timeout_seconds(self) -> float:
        """Timeout of the process groups."""
        return group_timeout_seconds(self.hang_seconds)

    def sentence(self) -> str:
        """Return the numbers for people."""
        origin = "measured" if self.measured else "planned"
        return (
            f"a step is {origin} at {format_seconds(self.step_seconds)} at most and a save planned at "
            f"{format_seconds(self.save_seconds)}: asked to stop {self.signal_seconds} s before the end of a job, "
            f"hang after {self.hang_seconds:g} s, process groups time out after {self.group_timeout_seconds:g} s"
        )

    def apply_to(self, cfg: RunConfig) -> RunConfig:
        """Return a configuration in which the limits are numbers."""
        cluster = cfg.cluster.model_copy(update={"signal_seconds": self.signal_seconds})
        faults = cfg.faults.model_copy(update={"hang_seconds": self.hang_seconds})
        return cfg.model_copy(update={"cluster": cluster, "faults": faults})


def group_timeout_seconds(hang_seconds: float) -> float:
    """Return the timeout of process groups whose ranks end themselves after ``hang_seconds``."""
    return hang_seconds + GROUP_MARGIN_SECONDS


def time_limits(
    cfg: RunConfig, world_size: int, run: RunDirectory | None = None, device_name: str | None = PLANNED_DEVICE
) -> TimeLimits:
    """Return the limits of a stage: those that are set, and for the others what follows from step and save.

    Args:
        cfg: A checked configuration.
        world_size: Ranks.
        run: Its run directory, whose log may have measured steps.
        device_name: Of the accelerator, as the driver reports it. With None ranks run on a CPU.
    """
    measured = measured_step_seconds(run, world_size) if run is not None else None
    step = planned_step_seconds(cfg, world_size, device_name) if measured is None else measured
    save = planned_save_seconds(cfg, world_size)
    signal, hang = cfg.cluster.signal_seconds, cfg.faults.hang_seconds
    return TimeLimits(
        step_seconds=step,
        measured=measured is not None,
        save_seconds=save,
        signal_seconds=_needed_signal(step, save) if signal is None else signal,
        hang_seconds=_needed_hang(step, save) if hang is None else hang,
    )


def planned_step_seconds(cfg: RunConfig, world_size: int, device_name: str | None = PLANNED_DEVICE) -> float:
    """Return the longest step that is planned for: every document fills its row.

    Args:
        cfg: A checked configuration.
        world_size: Ranks.
        device_name: See ``time_limits``.
    """
    if cfg.faults.planned_step_seconds is not None:
        return cfg.faults.planned_step_seconds
    flops = cfg.global_batch_tokens * training_flops_per_token(cfg.model, cfg.seq_length)
    rate = CPU_FLOPS_PER_SECOND
    if device_name is not None:
        peak = dense_peak_flops_per_second(device_name, "bf16") or dense_peak_flops_per_second(PLANNED_DEVICE, "bf16")
        assert peak is not None
        rate = PLANNED_MFU * peak
    return flops / (world_size * rate)


def measured_step_seconds(run: RunDirectory, world_size: int) -> float | None:
    """Return the longest of the last steps of a run, or None where too few were taken.

    Args:
        run: Its run directory.
        world_size: Ranks. Steps on another number of them count in proportion.
    """
    if not run.has_manifest:
        return None
    steps = [record.step_seconds for record in run.metrics().records if isinstance(record, StepRecord)]
    if len(steps) < _LEAST_MEASURED_STEPS:
        return None
    return max(steps[-_MEASURED_STEPS:]) * run.manifest.world_size / world_size


def planned_save_seconds(cfg: RunConfig, world_size: int) -> float:
    """Return how long a save takes: written once, by all ranks, then read back and hashed by each rank for its part."""
    weight_bytes = 4 if cfg.precision.compute == "fp32" else 2
    total_bytes = model_size(cfg.model).total * (weight_bytes + _ADAM_BYTES)
    return total_bytes / WRITE_BYTES_PER_SECOND + total_bytes / world_size / HASH_BYTES_PER_SECOND


def check_time_limits(cfg: RunConfig, limits: TimeLimits) -> None:
    """Refuse limits that were set by hand and contradict step and save.

    Raises:
        ConfigError: With the numbers and a setting that fits.
    """
    step, save = limits.step_seconds, limits.save_seconds
    origin = "measured" if limits.measured else "planned"
    facts = f"a step is {origin} at {format_seconds(step)} and a save at {format_seconds(save)}"
    known = "" if limits.measured else " If steps are shorter than planned, say so with faults.planned_step_seconds."
    if limits.hang_seconds <= 3 * step + save:
        raise ConfigError(
            f"faults.hang_seconds={limits.hang_seconds:g}",
            f"{facts}, and ranks that are well may need three steps and a save.",
            f"Set faults.hang_seconds={_needed_hang(step, save):g}, or null to have it follow from them.{known}",
        )
    if limits.signal_seconds < step + save:
        raise ConfigError(
            f"cluster.signal_seconds={limits.signal_seconds}",
            f"{facts}, and the signal is noticed at the end of a step.",
            f"Set cluster.signal_seconds={_needed_signal(step, save)}, or null to have it follow from them.{known}",
        )


def check_job_time(cfg: RunConfig, limits: TimeLimits) -> None:
    """Refuse a job that would be asked to stop before it has taken a step.

    Raises:
        ConfigError: With the numbers and a setting that fits.
    """
    needed = math.ceil(START_SECONDS + limits.step_seconds + limits.signal_seconds)
    if limits.signal_seconds > _MOST_SIGNAL_SECONDS:
        raise ConfigError(
            f"cluster.signal_seconds={limits.signal_seconds}",
            f"{limits.sentence()}, and Slurm asks {_MOST_SIGNAL_SECONDS} s before at most.",
            "Plan more ranks, or say with faults.planned_step_seconds how long a step takes.",
        )
    if cfg.cluster.time_limit_seconds < needed:
        hours, minutes = divmod(math.ceil(needed / 60), 60)
        raise ConfigError(
            f"cluster.time_limit={cfg.cluster.time_limit}",
            f"a job needs {format_seconds(START_SECONDS)} to start, {format_seconds(limits.step_seconds)} for a step, "
            f"and is asked to stop {format_seconds(limits.signal_seconds)} before its end.",
            f"Set cluster.time_limit={hours:02d}:{minutes:02d}:00 or longer, or say with faults.planned_step_seconds "
            "how long a step takes.",
        )


def with_job_limits(cfg: RunConfig, run: RunDirectory) -> RunConfig:
    """Return the configuration that a job is rendered from, in which the limits are numbers.

    Args:
        cfg: A checked configuration.
        run: Its run directory, which need not exist.

    Raises:
        ConfigError: If limits contradict each other, or a job of Slurm is too short to train and save.
    """
    limits = time_limits(cfg, cfg.parallelism.planned_world_size, run)
    check_time_limits(cfg, limits)
    # Nothing but Slurm ends a stage when its time is over.
    if cfg.launch.target is LaunchTarget.SLURM:
        check_job_time(cfg, limits)
    return limits.apply_to(cfg)


def _needed_hang(step_seconds: float, save_seconds: float) -> int:
    # A fifth more than what must be exceeded.
    return max(LEAST_HANG_SECONDS, math.ceil(1.2 * (3 * step_seconds + save_seconds)))


def _needed_signal(step_seconds: float, save_seconds: float) -> int:
    # Another save may be under way, which must end first.
    return max(LEAST_SIGNAL_SECONDS, math.ceil(step_seconds + 2 * save_seconds))
