"""Run one stage from its configuration to its finished manifest."""

from __future__ import annotations

import logging
import math
import sys
from typing import TYPE_CHECKING

from nemo_prolong import engine
from nemo_prolong.config.addresses import tokenizer_directory
from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.rules import check_platform
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.rank_environment import rank_and_size
from nemo_prolong.errors import EXIT_PREEMPTED, ConfigError, DataError
from nemo_prolong.logs import console_logging, run_logging
from nemo_prolong.plan.time_limits import TimeLimits, check_time_limits, time_limits
from nemo_prolong.records.checkpoint.manifest import step_of
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import StepRecord
from nemo_prolong.records.stage_manifest import ParentRecord, StageManifest, utc_now
from nemo_prolong.stages.manifest import continued, new_manifest
from nemo_prolong.stages.preflight import Start, check_files, dump
from nemo_prolong.telemetry.trackers import check_packages

if TYPE_CHECKING:
    from nemo_prolong.engine import StageTotals

log = logging.getLogger(__name__)


def run_stage(cfg: RunConfig, overrides: list[str]) -> None:
    """Train one stage. The same command again resumes where it stopped.

    Args:
        cfg: The stage.
        overrides: What the user typed, for the record.

    Raises:
        ConfigError: If kernels the stage needs do not exist here, the package of a tracker is not installed, the
            parent cannot be used, or a time limit is too short for a step and a save.
        DataError: If the data is missing or does not fit, or too many steps in a row have no target token.
        CheckpointError: If the parent is missing, or the run directory holds another run.
        TrainingError: If too many steps in a row would have harmed the model.
        SystemExit: With ``EXIT_PREEMPTED``, on every rank, if a signal asked to stop. The state is saved.
    """
    rank, world_size = rank_and_size()
    run = RunDirectory(cfg.run_dir)
    start = check_files(cfg, run, rank)
    if start.complete:
        _end_complete(cfg, run, world_size)
        return
    _check_kernels(cfg)
    limits = _time_limits(cfg, run, world_size)
    if rank == 0 and start.run is None:
        _check_tokenizer_loads(cfg)
    check_packages(cfg.tracker)
    run.path.mkdir(parents=True, exist_ok=True)
    manifest = new_manifest(
        cfg, start.run or start.parent, start.parent_record, _command(), world_size, start.data, start.stops
    )
    if start.run and start.resume:
        manifest = continued(manifest, start.run, step_of(start.resume), start.changes)
    if rank == 0:
        run.write_start(manifest, overrides, dump(cfg))
        _record_start(run, start, cfg, world_size)
    with run_logging(run.log_file(rank), console=rank == 0):
        _announce(cfg, start, manifest)
        _announce_limits(cfg, limits)
        # Importing NeMo takes seconds and prints a page. Nothing above needs it.
        totals = engine.train_stage(limits.apply_to(cfg), run, start.resume, start.parent_checkpoint)
        if totals is None:
            return
        if rank == 0:
            finished = _finished(manifest, cfg, totals)
            run.write_manifest(finished)
            run.record_event(finished.step, finished.status, f"{finished.step} of {finished.train_iters} steps")
            _announce_end(finished, run)
    if totals.stopped:
        raise SystemExit(EXIT_PREEMPTED)


def _end_complete(cfg: RunConfig, run: RunDirectory, world_size: int) -> None:
    """Say on rank 0 that there is nothing to do, to the other ranks too."""
    with console_logging():
        log.info("%s is complete already: %d of %d steps", run.path, run.manifest.step, run.manifest.train_iters)
    if world_size > 1:
        engine.train_stage(cfg, run, resume=None, parent_checkpoint=None, complete=True)


def _record_start(run: RunDirectory, start: Start, cfg: RunConfig, world_size: int) -> None:
    """Record how the run begins or resumes. Its goodput is counted from here."""
    ranks = f"on {world_size} rank{'' if world_size == 1 else 's'}"
    step = step_of(start.resume) if start.resume else 0
    for refusal in start.refused:
        run.record_event(step, "checkpoint_refused", refusal)
    for change in start.changes:
        run.record_event(step, "setting_changed", str(change))
    if start.resume:
        run.record_event(step, "resumed", f"from {start.resume.name}, {ranks}")
        return
    taken = "from scratch"
    if start.parent_record:
        taken = f"with the {start.parent_record.transition.replace('_', ' ')} of {start.parent_record.path}"
    run.record_event(step, "started", f"{taken}, {ranks}")
    for sentence in _changes_of_weights(start.parent_record, cfg) if start.parent_record else ():
        run.record_event(step, "parent_changed", sentence)


def _check_kernels(cfg: RunConfig) -> None:
    """Refuse a stage whose kernels this machine has not, or its environment forbids. Needs torch, but not NeMo."""
    check_platform(cfg, engine.current_platform())
    raise_all(engine.environment_findings(cfg))


def _time_limits(cfg: RunConfig, run: RunDirectory, world_size: int) -> TimeLimits:
    """Return the limits of the stage; refuse those that contradict what is planned. Needs torch.

    Limits that contradict what was measured are a warning. The run has got on with them so far.

    Raises:
        ConfigError: If limits that were set by hand are too short.
    """
    from nemo_prolong.telemetry.performance import device_name

    limits = time_limits(cfg, world_size, run, device_name())
    if not limits.measured:
        check_time_limits(cfg, limits)
    return limits


def _announce_limits(cfg: RunConfig, limits: TimeLimits) -> None:
    """Say the limits, and where they contradict what was measured."""
    log.info("time limits: %s", limits.sentence())
    try:
        check_time_limits(cfg, limits)
    except ConfigError as error:
        log.warning("%s", error)


def _check_tokenizer_loads(cfg: RunConfig) -> None:
    """Refuse a tokenizer that the export cannot load. Imports transformers, which NeMo imports anyway."""
    from nemo_prolong.data.tokenizer.loading import loading_problem

    directory = tokenizer_directory(cfg.data)
    problem = loading_problem(directory)
    if problem is not None:
        raise DataError(f"data.tokenizer={cfg.data.tokenizer}", f"{directory}: {problem.rule}", problem.remedy)


def _command() -> str:
    """Return the command of this process as it can be typed again."""
    return shell_command(["python", *sys.argv])


def _announce(cfg: RunConfig, start: Start, manifest: StageManifest) -> None:
    """Say what is about to happen, on one screen."""
    log.info(
        "%s: %s, rows of %d tokens, rotary_base %g, %d steps of %d tokens",
        cfg.stage,
        cfg.model.name,
        cfg.seq_length,
        cfg.model.rotary_base,
        cfg.train.train_iters,
        cfg.global_batch_tokens,
    )
    for refusal in start.refused:
        log.warning("refused %s", refusal)
    for verified in start.verified:
        log.info(verified)
    for change in start.changes:
        log.warning("goes on with another setting: %s", change)
    if start.resume:
        log.info("continues from %s", start.resume)
    elif manifest.parent:
        log.info("takes %s of %s", ", ".join(manifest.parent.taken), start.parent_checkpoint or cfg.parent)
        log.info("starts anew: %s", ", ".join(manifest.parent.not_taken))
        for sentence in _changes_of_weights(manifest.parent, cfg):
            log.info(sentence)
        if manifest.parent.rotary_base not in (None, cfg.model.rotary_base):
            log.info("RoPE base: %g in the parent, %g from here on", manifest.parent.rotary_base, cfg.model.rotary_base)
    log.info("writes %s; library output goes to %s/train.log", cfg.run_dir, cfg.run_dir)


def _changes_of_weights(parent: ParentRecord, cfg: RunConfig) -> list[str]:
    """Return what a Hugging Face directory holds otherwise than the stage takes it, one sentence each."""
    changes = []
    if parent.wrappers:
        changes.append(f"names of the parent's tensors are read without {', '.join(parent.wrappers)}")
    if parent.grown_vocab_rows:
        after = cfg.model.vocab_size
        changes.append(
            f"the vocabulary grows from {after - parent.grown_vocab_rows} to {after} tokens, and the new rows of "
            "embedding and LM head are the mean of the parent's"
        )
    return changes


def _finished(manifest: StageManifest, cfg: RunConfig, totals: StageTotals) -> StageManifest:
    """Return the manifest with what the stage has done."""
    return manifest.model_copy(
        update={
            "status": "complete" if totals.step == cfg.train.train_iters else "stopped",
            "step": totals.step,
            "consumed_train_rows": totals.step * cfg.train.global_batch_size,
            "consumed_train_tokens": totals.consumed_train_tokens,
            "consumed_target_tokens": totals.consumed_target_tokens,
            "skipped_steps": totals.skipped_steps,
            "finished_at": utc_now(),
        }
    )


def _announce_end(manifest: StageManifest, run: RunDirectory) -> None:
    """Say in one line how the stage ended."""
    # A stage may end with a validation, or with a step that has no loss.
    steps = [record for record in run.metrics().records if isinstance(record, StepRecord)]
    last_loss = next((record.loss for record in reversed(steps) if math.isfinite(record.loss)), math.nan)
    log.info("%s %s: %d steps, last loss %.4f, %s", manifest.stage, manifest.status, manifest.step, last_loss, run.path)
