"""Read what runs, evaluations and exports left on disk.

A report is wanted most when something went wrong, so whatever a run may lack (an evaluation, a finished last line of
``metrics.jsonl``, a data manifest) becomes a note for the reader. Only a run directory that is none is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_prolong.config.addresses import HF_PREFIX
from nemo_prolong.errors import ExportError
from nemo_prolong.records.evaluation import PerplexityResult, RecallResult, evaluation_directory, read_result
from nemo_prolong.records.run_log import EVENTS_FILE, METRICS_FILE, Goodput, GrowingRecords, goodput
from nemo_prolong.records.stage_manifest import StageManifest


@dataclass(frozen=True)
class GroupTotals:
    """Token losses of a group of tokens: their sum in nats and their number."""

    loss_sum: float
    target_tokens: int


Groups = dict[str, GroupTotals]
"""Losses by the name of their group."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of ``metrics.jsonl``; ``loss`` is NaN where the run recorded NaN.

    The fields with defaults are those that earlier versions did not record.
    """

    step: int
    loss: float
    real_tokens: int
    consumed_train_tokens: int
    step_seconds: float
    memory_bytes: int | None
    row_tokens: int | None = None
    mfu: float | None = None
    model_flops_per_second_per_rank: float | None = None
    data_wait_seconds: float | None = None
    checkpoint_seconds: float | None = None
    skipped_steps: int = 0
    by_position: Groups = field(default_factory=dict)
    by_domain: Groups = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.real_tokens / self.step_seconds if self.step_seconds > 0 else math.nan


@dataclass(frozen=True)
class Validation:
    """One validation: after how many steps, and the mean loss in nats per target token."""

    step: int
    loss: float


@dataclass(frozen=True)
class Event:
    """One line of ``events.jsonl``; ``time`` in Unix seconds."""

    time: float
    step: int
    event: str
    detail: str


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
        steps: Ascending by step; of a step that was repeated after a resume, the last record.
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
    steps: list[Step]
    validations: list[Validation]
    evaluated: EvaluatedModel
    data_manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
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
    manifest: dict[str, Any]
    evaluated: EvaluatedModel

    @property
    def max_logit_difference(self) -> float | None:
        """Largest difference to the Megatron model's logits that the export measured; None if it did not verify."""
        return (self.manifest.get("verification") or {}).get("max_logit_difference")


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
    steps, validations = read_metrics(Path(directory) / METRICS_FILE, notes)
    if manifest.status != "complete":
        notes.append(f"{directory}: status is {manifest.status}; figures show what was recorded so far.")
    data_manifest = _read_json_object(Path(manifest.data.root) / "manifest.json")
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
        events=read_events(Path(directory) / EVENTS_FILE, notes),
        goodput=_read_goodput(Path(directory)),
    )


def _read_export(directory: str, last_stage: StageRun) -> ExportedModel:
    manifest = _read_json_object(Path(directory) / "export_manifest.json")
    if manifest is None:
        raise ExportError(
            f"exported={directory}",
            "There is no readable export_manifest.json in it.",
            "Run scripts/export.py first, or set exported=null.",
        )
    trained = last_stage.manifest.trained_context_length
    evaluated = _read_evaluation(f"{HF_PREFIX}{directory}", "export", trained, last_stage.notes)
    return ExportedModel(directory, manifest, evaluated)


def _read_evaluation(model: str, label: str, trained_context_length: int, notes: list[str]) -> EvaluatedModel:
    directory = evaluation_directory(model)
    perplexity = read_result(directory / "perplexity.json", PerplexityResult, notes)
    recall = read_result(directory / "recall.json", RecallResult, notes)
    return EvaluatedModel(model, label, trained_context_length, perplexity, recall)


def read_metrics(path: Path, notes: list[str]) -> tuple[list[Step], list[Validation]]:
    """Read ``metrics.jsonl``; lines that cannot be read are counted in a note and skipped.

    A run that was killed leaves a cut line, and its successor may repeat the steps after the last checkpoint: the
    last record of a step counts, because it is the one the final weights came from.
    """
    if not path.is_file():
        notes.append(f"{path.parent}: there is no metrics.jsonl, so no loss and no throughput.")
        return [], []
    steps: dict[int, Step] = {}
    validations: dict[int, Validation] = {}
    unreadable = 0
    for line in filter(str.strip, path.read_text("utf-8", errors="replace").splitlines()):
        try:
            record = json.loads(line)
            if "val_loss" in record:
                validations[record["step"]] = Validation(int(record["step"]), float(record["val_loss"]))
            else:
                steps[record["step"]] = _step(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1
    if unreadable:
        notes.append(f"{path}: {unreadable} unreadable line(s) skipped; a run that is killed may leave one.")
    return _ascending(steps.values()), _ascending(validations.values())


def read_events(path: Path, notes: list[str]) -> list[Event]:
    """Read ``events.jsonl``; a run before its first event has none. Unreadable lines are counted in a note."""
    file = GrowingRecords(path)
    file.refresh()
    events = []
    for record in file.records:
        try:
            event = Event(float(record["time"]), int(record["step"]), str(record["event"]), str(record["detail"]))
        except (ValueError, KeyError, TypeError):
            file.unreadable += 1
        else:
            events.append(event)
    if file.unreadable:
        notes.append(f"{path}: {file.unreadable} unreadable line(s) skipped; a run that is killed may leave one.")
    return events


def _read_goodput(run_dir: Path) -> Goodput | None:
    metrics, events = GrowingRecords(run_dir / METRICS_FILE), GrowingRecords(run_dir / EVENTS_FILE)
    metrics.refresh()
    events.refresh()
    try:
        return goodput(metrics.records, events.records)
    except (KeyError, TypeError):  # records of other software, or damaged ones
        return None


def _step(record: dict[str, Any]) -> Step:
    return Step(
        step=int(record["step"]),
        loss=float(record["loss"]),
        real_tokens=int(record["real_tokens"]),
        consumed_train_tokens=int(record["consumed_train_tokens"]),
        step_seconds=float(record["step_seconds"]),
        memory_bytes=record.get("memory_bytes"),
        row_tokens=record.get("row_tokens"),
        mfu=record.get("mfu"),
        model_flops_per_second_per_rank=record.get("model_flops_per_second_per_rank"),
        data_wait_seconds=record.get("data_wait_seconds"),
        checkpoint_seconds=record.get("checkpoint_seconds"),
        skipped_steps=int(record.get("skipped_steps", 0)),
        by_position=_groups(record.get("loss_by_position", {})),
        by_domain=_groups(record.get("loss_by_domain", {})),
    )


def _groups(recorded: dict[str, dict[str, Any]]) -> Groups:
    return {
        name: GroupTotals(float(group["loss_sum"]), int(group["target_tokens"])) for name, group in recorded.items()
    }


def _ascending(records: Iterable[Any]) -> list[Any]:
    return sorted(records, key=lambda record: record.step)


def _read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the object in ``path``, or None if there is no such file or it holds something else."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
