"""Rules of one stage: its parent, its data, its batch, its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import PurePosixPath

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.config.commands import typed
from nemo_prolong.config.keys import all_keys, nearest_key
from nemo_prolong.config.rules.launch import LAUNCH_RULES
from nemo_prolong.config.rules.layout import LAYOUT_RULES
from nemo_prolong.config.rules.memory import memory_findings
from nemo_prolong.config.rules.overlap import overlap_findings
from nemo_prolong.config.rules.precision import precision_findings
from nemo_prolong.config.schema import RunConfig, Stage, Transition
from nemo_prolong.errors import ConfigError
from nemo_prolong.units import exact_tokens

_PROPORTION_TOLERANCE = 1e-6


def _name(cfg: RunConfig) -> list[ConfigError]:
    path = PurePosixPath(cfg.name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        rule = f"must be a directory below runs_dir={cfg.runs_dir}."
        name = cfg.stage.value if path.name in ("", "..") else path.name
        return [ConfigError(f"name={cfg.name}", rule, f"Set {typed('name', name)}.")]
    return []


def _parent(cfg: RunConfig) -> list[ConfigError]:
    what = f"parent={cfg.parent or 'null'}"
    if cfg.transition is Transition.SCRATCH:
        if cfg.parent is None:
            return []
        rule = "transition=scratch takes nothing from a parent."
        return [ConfigError(what, rule, "Set parent=null, or transition=weights.")]
    if cfg.parent is None:
        rule = f"transition={cfg.transition} takes it from a parent."
        return [ConfigError(what, rule, "Set parent=runs/NAME or parent=hf:DIR, or transition=scratch.")]
    if PurePosixPath(cfg.parent) == PurePosixPath(cfg.run_dir):
        rule = "a run cannot be its own parent."
        return [ConfigError(what, rule, f"Set {typed('name', f'{cfg.name}-2')}, or the parent this stage starts from.")]
    if cfg.transition is Transition.WEIGHTS_AND_OPTIMIZER and cfg.parent.startswith(HF_PREFIX):
        rule = "a Hugging Face directory holds no optimizer state."
        return [ConfigError(what, rule, "Set transition=weights, or parent=runs/NAME.")]
    return []


def _advertised_length(cfg: RunConfig) -> list[ConfigError]:
    advertised = cfg.advertised_context_length
    if advertised is None or advertised >= cfg.seq_length:
        return []
    rule = f"is less than the rows it trains on (seq_length={exact_tokens(cfg.seq_length)})."
    remedy = f"Set advertised_context_length={exact_tokens(cfg.seq_length)}, or null."
    return [ConfigError(f"advertised_context_length={exact_tokens(advertised)}", rule, remedy)]


def _resume(cfg: RunConfig) -> list[ConfigError]:
    keys, found = set(all_keys(RunConfig)), []
    for key in cfg.resume.allow:
        if key not in keys:
            nearest = nearest_key(RunConfig, key)
            remedy = f"Did you mean {nearest}?" if nearest else "Name keys as they are typed, such as optim.lr."
            found.append(ConfigError(f"resume.allow=[{key}]", "no such key in the configuration.", remedy))
    return found


def _mixture(cfg: RunConfig) -> list[ConfigError]:
    found = []
    paths = [entry.path for entry in cfg.data.mixture]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        total = sum(entry.proportion for entry in cfg.data.mixture if entry.path == path)
        remedy = f"Keep one entry, with proportion {total:g}."
        found.append(ConfigError(f"data.mixture path={path}", "is listed more than once.", remedy))
    total = math.fsum(entry.proportion for entry in cfg.data.mixture)
    if abs(total - 1.0) > _PROPORTION_TOLERANCE:
        scaled = ", ".join(f"{entry.path} {entry.proportion / total:.6g}" for entry in cfg.data.mixture)
        rule = f"proportions must sum to 1, and these sum to {total:.9g}."
        found.append(ConfigError("data.mixture", rule, f"Scaled to 1 they are: {scaled}."))
    return found


def _masks(cfg: RunConfig) -> list[ConfigError]:
    if cfg.data.apply_instruct_masks == (cfg.stage is Stage.SFT):
        return []
    if cfg.stage is Stage.SFT:
        rule = "stage=sft trains on the answers only, or the model learns to ask."
        return [ConfigError("data.apply_instruct_masks=false", rule, "Set data.apply_instruct_masks=true.")]
    rule = f"stage={cfg.stage} trains on every token; only sft masks."
    remedy = "Set data.apply_instruct_masks=false, or stage=sft."
    return [ConfigError("data.apply_instruct_masks=true", rule, remedy)]


def _batch(cfg: RunConfig) -> list[ConfigError]:
    if cfg.train.micro_batch_size == 1:
        return []
    rule = "a packed row is a micro-batch of its own: its documents already are the batch."
    remedy = f"Set train.micro_batch_size=1; train.global_batch_size={cfg.train.global_batch_size} stays the batch."
    return [ConfigError(f"train.micro_batch_size={cfg.train.micro_batch_size}", rule, remedy)]


def _validation(cfg: RunConfig) -> list[ConfigError]:
    interval, steps = cfg.train.val_check_interval, cfg.train.train_iters
    what = f"train.val_check_interval={interval}"
    if interval == 0:
        return []
    if not cfg.data.validation:
        rule = "there is nothing to validate on: data.validation is empty."
        return [ConfigError(what, rule, "Set train.val_check_interval=0, or data.validation=[DIRECTORY].")]
    if interval > steps:
        rule = f"never happens in train.train_iters={steps} steps."
        return [ConfigError(what, rule, f"Set train.val_check_interval={steps}, or 0 to never validate.")]
    return []


def _schedule(cfg: RunConfig) -> list[ConfigError]:
    optim, steps, found = cfg.optim, cfg.train.train_iters, []
    if optim.min_lr > optim.lr:
        rule = f"is above the peak optim.lr={optim.lr:g}."
        found.append(ConfigError(f"optim.min_lr={optim.min_lr:g}", rule, f"Set optim.min_lr={optim.lr / 10:g}."))
    if optim.lr_warmup_iters >= steps:
        rule = f"warmup must end before the last of train.train_iters={steps} steps."
        remedy = f"Set optim.lr_warmup_iters={steps // 10} (10%)."
        found.append(ConfigError(f"optim.lr_warmup_iters={optim.lr_warmup_iters}", rule, remedy))
    return found


def _job(cfg: RunConfig) -> list[ConfigError]:
    """Check that a job has time before it is asked to stop; ``plan.time_limits`` knows how much it needs."""
    cluster = cfg.cluster
    if cluster.signal_seconds is None or cluster.signal_seconds < cluster.time_limit_seconds:
        return []
    rule = f"a job of cluster.time_limit={cluster.time_limit} would be asked to stop before it begins."
    remedy = "Set cluster.signal_seconds=null, or a longer cluster.time_limit, such as 04:00:00."
    return [ConfigError(f"cluster.signal_seconds={cluster.signal_seconds}", rule, remedy)]


RUN_RULES: tuple[Callable[[RunConfig], list[ConfigError]], ...] = (
    _name,
    _parent,
    _advertised_length,
    _resume,
    _mixture,
    _masks,
    _batch,
    _validation,
    _schedule,
    _job,
    *LAUNCH_RULES,
    *LAYOUT_RULES,
    precision_findings,
    memory_findings,
    overlap_findings,
)
"""Rules of a stage, in the order in which they are reported."""
