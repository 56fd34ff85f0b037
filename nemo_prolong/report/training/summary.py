"""``summary.json``: the numbers of the report, for scripts and for comparing two machines."""

from __future__ import annotations

import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from nemo_prolong.records.evaluation import PerplexityResult, RecallResult
from nemo_prolong.report.training.read import EvaluatedModel, Lineage, StageRun
from nemo_prolong.report.training.telemetry import changes, event_counts, median_of, target_share

WARMUP_STEPS = 3
"""First steps of a stage that throughput leaves out: they compile, allocate and fill caches."""


def summarize(lineage: Lineage) -> dict[str, Any]:
    """Return the content of ``summary.json``; every number in it is finite or null."""
    return {
        "format": 1,
        "stages": [summarize_stage(stage) for stage in lineage.stages],
        "perplexity": [_result(model, model.perplexity) for model in lineage.evaluated if model.perplexity],
        "recall": [_result(model, model.recall) for model in lineage.evaluated if model.recall],
        "max_logit_difference": finite(lineage.export.max_logit_difference) if lineage.export else None,
        "machine": describe_machine(),
        "versions": lineage.stages[-1].manifest.versions,
        "git_commit": lineage.stages[-1].manifest.git_commit,
        "notes": [note for stage in lineage.stages for note in stage.notes],
    }


def summarize_stage(stage: StageRun) -> dict[str, Any]:
    """Return one entry of ``stages``; losses in nats per target token, tokens without padding."""
    memory = [step.memory_bytes for step in stage.steps if step.memory_bytes is not None]
    return {
        "name": stage.manifest.name,
        "stage": stage.manifest.stage,
        "directory": stage.directory,
        "status": stage.manifest.status,
        "transition": stage.transition,
        "first_loss": finite(stage.steps[0].loss) if stage.steps else None,
        "last_loss": finite(stage.steps[-1].loss) if stage.steps else None,
        "last_validation_loss": finite(stage.validations[-1].val_loss) if stage.validations else None,
        "tokens_trained": stage.tokens_trained,
        "target_tokens": sum(step.target_tokens or 0 for step in stage.steps),
        "target_share": finite(target_share(stage.steps)),
        "seq_length": stage.manifest.seq_length,
        "trained_context_length": stage.manifest.trained_context_length,
        "rotary_base": stage.manifest.rotary_base,
        "train_iters": stage.manifest.train_iters,
        "steps": stage.steps[-1].step if stage.steps else 0,
        "tokens_per_second": finite(median_tokens_per_second(stage)),
        "wall_seconds": stage.wall_seconds,
        "peak_memory_bytes": max(memory, default=None),
        "mfu": finite(median_of(stage.steps, "mfu")),
        "fp8_peak_share": finite(median_of(stage.steps, "fp8_peak_share")),
        "goodput": finite(stage.goodput.fraction) if stage.goodput else None,
        "skipped_steps": stage.steps[-1].skipped_steps if stage.steps else 0,
        "events": event_counts(stage),
        "loss_by_position": _changes(stage, "loss_by_position"),
        "loss_by_domain": _changes(stage, "loss_by_domain"),
    }


def _changes(stage: StageRun, key: str) -> dict[str, dict[str, float | int | None]]:
    """Return the losses of every group over the first and the last steps of a stage."""
    return {
        change.name: {
            "first_loss": finite(change.first_loss),
            "last_loss": finite(change.last_loss),
            "target_tokens": change.target_tokens,
        }
        for change in changes(stage.steps, key)
    }


def steady_throughput(stage: StageRun) -> list[float]:
    """Return tokens per second of every step after the warm-up, or of all if there are no more."""
    steps = stage.steps[WARMUP_STEPS:] or stage.steps
    return [step.real_tokens_per_second for step in steps if math.isfinite(step.real_tokens_per_second)]


def median_tokens_per_second(stage: StageRun) -> float | None:
    """Return the median of ``steady_throughput``; None for a stage without steps."""
    rates = steady_throughput(stage)
    return statistics.median(rates) if rates else None


def finite(value: float | None) -> float | None:
    """Return ``value``, or None for NaN and infinity, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _result(model: EvaluatedModel, result: PerplexityResult | RecallResult) -> dict[str, Any]:
    """Return a result under the model it belongs to; the settings are in the report's commands."""
    identity = {"model": model.model, "label": model.label, "trained_context_length": model.trained_context_length}
    measured = result.model_dump(exclude={"task", "model", "seconds", "settings"})
    for bucket in measured.get("buckets", []):
        del bucket["documents"]
    return identity | measured


def describe_machine() -> dict[str, Any]:
    """Describe the machine this runs on, in words a reader can compare."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
