"""Assemble the page: one HTML file that loads nothing, runs no script, and escapes every string it was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nemo_prolong.config.schema import ReportConfig, Stage
from nemo_prolong.plan.devices import MFU_CONVENTION
from nemo_prolong.report import numbers
from nemo_prolong.report.pages import Tile, render_page
from nemo_prolong.report.svg import NUM_STYLES
from nemo_prolong.report.training import tables, telemetry_tables
from nemo_prolong.report.training.figures import figures_of
from nemo_prolong.report.training.read import Lineage, StageRun
from nemo_prolong.report.training.summary import describe_machine
from nemo_prolong.text import counted
from nemo_prolong.units import format_seconds, format_tokens


@dataclass(frozen=True)
class LineageBox:
    """One box of the lineage: a stage or the export.

    Attributes:
        name: What it is.
        took: What it took from the box before, on the arrow between them; empty for the first.
        facts: (title, value).
        style: Colour, the same as in the charts; -1 for the export.
    """

    name: str
    took: str
    facts: list[tuple[str, str]]
    style: int


def render(lineage: Lineage, cfg: ReportConfig) -> str:
    """Return the whole page."""
    models = lineage.evaluated
    return render_page(
        "report.html",
        ["report.css"],
        title=_title(lineage.stages),
        subtitle=_subtitle(lineage),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=headline_tiles(lineage),
        lineage=lineage_steps(lineage),
        figures=figures_of(lineage),
        results=tables.results_table(lineage.stages),
        window_words=telemetry_tables.WINDOW_WORDS,
        domains=telemetry_tables.domain_table(lineage.stages),
        positions=telemetry_tables.position_table(lineage.stages),
        performance=telemetry_tables.performance_table(lineage.stages),
        mfu_convention=MFU_CONVENTION,
        events=telemetry_tables.events_table(lineage.stages),
        perplexity=tables.perplexity_table(models),
        recall=tables.recall_table(models),
        settings=tables.settings_table(lineage.stages),
        model_facts=tables.model_facts(lineage.stages),
        mixture=tables.mixture_table(lineage.stages),
        versions=tables.versions_table(lineage.stages),
        machine=tables.machine_table(describe_machine()),
        commands=tables.commands(lineage, cfg),
        commit=lineage.stages[-1].manifest.git_commit,
        manifests=_data_hashes(lineage.stages),
        notes_of_runs=[note for stage in lineage.stages for note in stage.notes],
        missing_perplexity=tables.missing_results(models, "perplexity"),
        missing_recall=tables.missing_results(models, "recall"),
        export=_export_facts(lineage),
    )


def _title(stages: Sequence[StageRun]) -> str:
    first, longest = stages[0].manifest.seq_length, max(stage.manifest.seq_length for stage in stages)
    model = stages[-1].manifest.model.name
    start = f"{format_tokens(first)} to " if first < longest else ""
    return f"{model}: {start}{format_tokens(longest)} tokens of context"


def _subtitle(lineage: Lineage) -> str:
    stages = lineage.stages
    trained = numbers.tokens(sum(stage.tokens_trained for stage in stages))
    walls = [stage.wall_seconds for stage in stages if stage.wall_seconds is not None]
    took = f" in {format_seconds(sum(walls))} of wall time" if len(walls) == len(stages) else ""
    names = ", ".join(stage.label for stage in stages)
    return f"{counted(len(stages), 'stage')} ({names}), {trained} training tokens{took}."


def headline_tiles(lineage: Lineage) -> list[Tile]:
    """Return the numbers a reader wants first, only those that were measured."""
    stages = lineage.stages
    tiles = [_loss_tile(stages[0]), _perplexity_tile(stages), _recall_tile(stages)]
    if lineage.export:
        value = tables.logit_difference_words(lineage.export.max_logit_difference)
        tiles.append(Tile(value, "largest logit difference", "exported model against the Megatron model"))
    return [tile for tile in tiles if tile is not None]


def _loss_tile(stage: StageRun) -> Tile | None:
    losses = [step.loss for step in stage.steps if math.isfinite(step.loss)]
    if not losses:
        return None
    first, last = losses[0], losses[-1]
    return Tile(
        f"{first:.2f} \u2192 {last:.2f}", f"training loss of {stage.label}", "first and last step, nats per token"
    )


def _perplexity_tile(stages: Sequence[StageRun]) -> Tile | None:
    """Compare the last two pretraining stages where it matters: at the farthest positions."""
    trained = [stage.evaluated for stage in stages if stage.manifest.stage != Stage.SFT]
    measured = [(model.label, model.perplexity.buckets[-1]) for model in trained if model.perplexity]
    if len(measured) < 2:
        return None
    (label_before, before), (label_after, after) = measured[-2:]
    if before.span != after.span or before.perplexity is None or after.perplexity is None:
        return None
    return Tile(
        f"{numbers.significant(before.perplexity)} \u2192 {numbers.significant(after.perplexity)}",
        f"perplexity at {numbers.span(*after.span)}",
        f"{label_before} \u2192 {label_after}, tokens that far into a document",
    )


def _recall_tile(stages: Sequence[StageRun]) -> Tile | None:
    measured = [(stage.label, stage.evaluated.recall) for stage in stages if stage.evaluated.recall]
    if not measured:
        return None
    label, result = measured[-1]
    longest = max(result.lengths, key=lambda entry: entry.length)
    return Tile(
        numbers.percent(longest.exact_match),
        f"recall at {format_tokens(longest.length)} tokens",
        f"{label}, key-value pairs, {longest.samples} prompts",
    )


def lineage_steps(lineage: Lineage) -> list[LineageBox]:
    """Return the strip: every stage with its length, RoPE base and tokens, then the export."""
    steps = []
    for number, stage in enumerate(lineage.stages):
        took = tables.transition_words(stage.transition) if stage.manifest.parent else ""
        facts = [
            ("seq_length", format_tokens(stage.manifest.seq_length)),
            ("rotary_base", numbers.base(stage.manifest.rotary_base)),
            ("tokens", numbers.tokens(stage.tokens_trained)),
            ("steps", f"{stage.manifest.train_iters:,}"),
        ]
        steps.append(LineageBox(stage.label, took, facts, number % NUM_STYLES))
    if lineage.export:
        facts = [
            ("context", format_tokens(lineage.stages[-1].manifest.advertised_context_length)),
            ("dtype", lineage.export.manifest.dtype),
            ("max diff.", tables.logit_difference_words(lineage.export.max_logit_difference)),
        ]
        steps.append(LineageBox("export", "safetensors", facts, -1))
    return steps


def _data_hashes(stages: Sequence[StageRun]) -> list[tuple[str, str]]:
    """Return (data root, manifest SHA-256) of all stages, each once."""
    sections = [stage.manifest.data for stage in stages]
    return list(dict.fromkeys((data.root, data.manifest_sha256) for data in sections if data.manifest_sha256))


def _export_facts(lineage: Lineage) -> dict[str, Any] | None:
    if lineage.export is None:
        return None
    difference = tables.logit_difference_words(lineage.export.max_logit_difference)
    return {"directory": lineage.export.directory, "difference": difference}
