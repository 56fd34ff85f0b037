"""Read what runs, evaluations and exports left on disk.

A report is wanted most when something went wrong, so whatever a run may lack (an evaluation, a finished last line of
``metrics.jsonl``, a data manifest) becomes a note for the reader. Only a run directory that is none is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.errors import ExportError
from nemo_prolong.records.evaluation import (
    PerplexityResult,
    RecallResult,
    evaluation_directory,
    read_result,
    why_stale,
)
from nemo_prolong.records.export_manifest import ExportManifest
from nemo_prolong.records.run_directory import RunDirectory
from nemo_prolong.records.run_log import (
    EventRecord,
    Goodput,
    GrowingLog,
    R,
    StepRecord,
    ValidationRecord,
    metrics_log,
)
from nemo_prolong.records.stage_manifest import StageManifest


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its evaluation results, None where there are none.

    Attributes:
        model: As ``scripts/evaluate.py`` takes it.
        label: Short name in figures and tables.
        trained_context_length: Longest row it was trained on, in tokens.
        perplexity: From ``perplexity.json``.
        recall: From ``recall.json``.
    """

    model: str
    label: str
    trained_context_length: int
    perplexity: PerplexityResult | None
    recall: RecallResult | None

    def is_beyond_training(self, length_tokens: int) -> bool:
        """Return whether a document of this length is longer than any row the model was trained on."""
        return length_tokens > self.trained_context_length


@dataclass(frozen=True)
class StageRun:
    """One run directory.

    Attributes:
        directory: As given.
        label: The stage's name, or the run's where two runs are of one stage.
        manifest: ``stage.json``.
        config: ``config.json``, empty if missing.
        steps: Ascending by step. Of a step that was repeated after a resume, it is the last record.
        validations: Ascending by step.
        evaluated: The model it produced.
        data_manifest: ``manifest.json`` of its data root, empty if missing.
        notes: What a reader should know about the record.
        events: In the order in which they happened.
        goodput: Useful time and wall time; None where nothing was recorded.
    """

    directory: str
    label: str
    manifest: StageManifest
    config: dict[str, Any]
    steps: list[StepRecord]
    validations: list[ValidationRecord]
    evaluated: EvaluatedModel
    data_manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    events: list[EventRecord] = field(default_factory=list)
    goodput: Goodput | None = None

    @property
    def wall_seconds(self) -> float | None:
        """From the start of the run to its end; None while it runs."""
        if self.manifest.finished_at is None:
            return None
        started, finished = map(datetime.fromisoformat, (self.manifest.started_at, self.manifest.finished_at))
        return (finished - started).total_seconds()

    @property
    def tokens_trained(self) -> int:
        """Real tokens this stage trained on; of a run that did not end, up to its last recorded step."""
        recorded = self.steps[-1].consumed_train_tokens if self.steps else 0
        return max(self.manifest.consumed_train_tokens, recorded)

    @property
    def transition(self) -> str:
        """What it took from its parent."""
        return self.manifest.parent.transition if self.manifest.parent else "scratch"


@dataclass(frozen=True)
class ExportedModel:
    """An exported directory: its ``export_manifest.json`` and its results."""

    directory: str
    manifest: ExportManifest
    evaluated: EvaluatedModel

    @property
    def max_logit_difference(self) -> float | None:
        """Largest difference to the Megatron model's logits that the export measured; None if it did not verify."""
        verification = self.manifest.verification
        return verification.max_logit_difference if verification is not None else None


@dataclass(frozen=True)
class Lineage:
    """Everything a report is about: the stages in their order, and the export if there is one."""

    stages: list[StageRun]
    export: ExportedModel | None

    @property
    def evaluated(self) -> list[EvaluatedModel]:
        """All models, the exported one last."""
        return [stage.evaluated for stage in self.stages] + ([self.export.evaluated] if self.export else [])


def read_lineage(runs: list[str], export: str | None) -> Lineage:
    """Read run directories in the order given, and an exported directory.

    Raises:
        CheckpointError: If a run directory is missing or its ``stage.json`` is unusable.
        ExportError: If ``export`` is no exported directory.
    """
    manifests = [StageManifest.read(Path(directory)) for directory in runs]
    names = [manifest.stage for manifest in manifests]
    labels = [m.stage if names.count(m.stage) == 1 else m.name for m in manifests]
    stages = [_read_stage(*entry) for entry in zip(runs, labels, manifests, strict=True)]
    return Lineage(stages, None if export is None else _read_export(export, stages[-1]))


def _read_stage(directory: str, label: str, manifest: StageManifest) -> StageRun:
    notes: list[str] = []
    run = RunDirectory(directory)
    steps, validations = read_metrics(run.metrics_file, notes)
    if manifest.status != "complete":
        notes.append(f"{directory}: status is {manifest.status}; figures show what was recorded so far.")
    data_manifest = _read_json_object(Path(manifest.data.location) / "manifest.json")
    evaluated = _read_evaluation(directory, label, manifest.trained_context_length, notes)
    config = _read_json_object(Path(directory) / "config.json") or {}
    return StageRun(
        directory=directory,
        label=label,
        manifest=manifest,
        config=config,
        steps=steps,
        validations=validations,
        evaluated=evaluated,
        data_manifest=data_manifest or {},
        notes=notes,
        events=_noted(run.events(), notes),
        goodput=run.goodput(),
    )


def _read_export(directory: str, last_stage: StageRun) -> ExportedModel:
    try:
        manifest = ExportManifest.read(Path(directory))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"exported={directory}",
            "There is no readable export_manifest.json in it.",
            "Run scripts/export.py first, or set exported=null.",
        ) from error
    trained = last_stage.manifest.trained_context_length
    evaluated = _read_evaluation(f"{HF_PREFIX}{directory}", "export", trained, last_stage.notes)
    return ExportedModel(directory, manifest, evaluated)


def _read_evaluation(model: str, label: str, trained_context_length: int, notes: list[str]) -> EvaluatedModel:
    directory = evaluation_directory(model)
    perplexity = read_result(directory / "perplexity.json", PerplexityResult, notes)
    recall = read_result(directory / "recall.json", RecallResult, notes)
    stale = (why_stale(model, result) for result in (perplexity, recall) if result is not None)
    notes += [f"{reason}." for reason in stale if reason is not None]
    return EvaluatedModel(model, label, trained_context_length, perplexity, recall)


def read_metrics(path: Path, notes: list[str]) -> tuple[list[StepRecord], list[ValidationRecord]]:
    """Read ``metrics.jsonl``; lines that cannot be read are counted in a note and skipped.

    A run that was killed leaves a cut line, and its successor may repeat the steps after the last checkpoint: the
    last record of a step counts, because it is the one the final weights came from.
    """
    if not path.is_file():
        notes.append(f"{path.parent}: there is no metrics.jsonl, so no loss and no throughput.")
        return [], []
    steps: dict[int, StepRecord] = {}
    validations: dict[int, ValidationRecord] = {}
    log = metrics_log(path.parent)
    log.refresh(ended=True)
    for record in _noted(log, notes):
        if isinstance(record, StepRecord):
            steps[record.step] = record
        else:
            validations[record.step] = record
    return _ascending(steps.values()), _ascending(validations.values())


def _noted(log: GrowingLog[R], notes: list[str]) -> list[R]:
    """Return the records of a log that was read; unreadable lines are counted in a note."""
    if log.unreadable:
        notes.append(f"{log.path}: {log.unreadable} unreadable line(s) skipped; a run that is killed may leave one.")
    return log.records


def _ascending(records: Iterable[Any]) -> list[Any]:
    return sorted(records, key=lambda record: record.step)


def _read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in ``path``, or None if there is no such file or it holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
