"""The page of a data card: one HTML file that loads nothing, runs no script, and escapes every string it was given."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from nemo_prolong.data.epochs import MAX_EPOCHS
from nemo_prolong.records.data_manifest import DataManifest, MaskedPart, Sample, SampleBoundary, Samples
from nemo_prolong.report import numbers
from nemo_prolong.report.data_card import figures, tables
from nemo_prolong.report.data_card.charts import strip
from nemo_prolong.report.pages import NARROW, WIDE, Tile, render_page
from nemo_prolong.text import counted


@dataclass(frozen=True)
class ShownBoundary:
    """A boundary with its text in parts."""

    position: str
    before: list[MaskedPart]
    after: list[MaskedPart]


@dataclass(frozen=True)
class ShownSample:
    """A row as the page shows it; ``open`` unfolds its text."""

    number: str
    facts: str
    wide: Markup
    narrow: Markup
    boundaries: list[ShownBoundary]
    masked: list[MaskedPart]
    open: bool


def render(manifest: DataManifest, samples: Samples, manifest_sha256: str) -> str:
    """Return the whole page."""
    return render_page(
        "data_card.html",
        ["report.css", "data_card.css"],
        title=title(manifest),
        subtitle=subtitle(manifest),
        tiles=headline_tiles(manifest),
        warnings=tables.warnings(manifest),
        lengths=figures.length_figures(manifest),
        length_legend=figures.length_legend(),
        documents=tables.documents_table(manifest),
        stages=_stages(manifest),
        recipe_epochs=MAX_EPOCHS,
        domains=tables.domain_table(manifest),
        row_sets=tables.row_sets_table(manifest),
        targets=tables.targets_table(manifest),
        packing=figures.packing_figure(manifest),
        drops=tables.drops_table(manifest),
        attention=figures.attention_figure(manifest),
        attention_table=tables.attention_table(manifest),
        pieces_table=tables.pieces_table(manifest),
        samples=list(_shown_samples(samples)),
        sources=tables.sources_table(manifest),
        rejected=tables.rejected_table(manifest),
        examples=tables.examples_table(manifest),
        unread=tables.unread_table(manifest),
        files=tables.files_table(manifest),
        tokenizer=tables.tokenizer_table(manifest),
        command=manifest.command,
        seed=manifest.seed,
        manifest_sha256=manifest_sha256,
        software=tables.software_table(manifest),
        hashes=tables.hashes_table(manifest),
        config=json.dumps(manifest.config, indent=2, ensure_ascii=False),
    )


def title(manifest: DataManifest) -> str:
    """Return the heading of the card."""
    tokens = sum(facts.tokens for _, _, facts in manifest.splits)
    lengths = tables.lengths_words(manifest)
    return f"{numbers.tokens(tokens)} tokens of {tables.listed(manifest.domains)}, in rows of {lengths}"


def subtitle(manifest: DataManifest) -> str:
    """Return what the directory is, in a sentence."""
    stages = f" for {tables.listed(manifest.stages)}" if manifest.stages else ""
    sources, row_sets = counted(len(manifest.sources), "source"), counted(len(manifest.row_sets), "row set")
    return f"{sources}, packed into {row_sets}{stages}; a tokenizer of {manifest.vocab_size:,} tokens."


def headline_tiles(manifest: DataManifest) -> list[Tile]:
    """Return the numbers that a reader wants first."""
    by_split: dict[str, int] = {}
    for _, split, facts in manifest.splits:
        by_split[split] = by_split.get(split, 0) + facts.tokens
    documents = sum(facts.documents for _, _, facts in manifest.splits)
    tokens = sum(by_split.values())
    entries = manifest.row_sets.values()
    rows = sum(entry.rows for entry in entries)
    fill = sum(entry.tokens for entry in entries) / sum(entry.rows * entry.seq_length for entry in entries)
    rejected = sum(r.documents for source in manifest.sources for r in source.rejected.values())
    worst, worst_fill = min(((path, entry.fill) for path, entry in manifest.row_sets.items()), key=lambda item: item[1])
    mean = f"{tokens / documents:,.0f} tokens on average" if documents else "none"
    splits = ", ".join(f"{numbers.tokens(count)} {split}" for split, count in by_split.items())
    return [
        Tile(numbers.tokens(tokens), "tokens", splits),
        Tile(numbers.count(documents), "documents", f"{mean}, {rejected:,} rejected"),
        Tile(numbers.count(rows), "rows", f"in {len(entries)} row sets, of {tables.lengths_words(manifest)} tokens"),
        Tile(tables.fill_words(fill), "fill", "every row set" if worst_fill == 1 else f"lowest: {worst}"),
    ]


def _stages(manifest: DataManifest) -> list[dict[str, Any]]:
    return [
        {"figure": figures.stage_figure(manifest, name, stage), "table": tables.stage_table(manifest, stage)}
        for name, stage in manifest.stages.items()
    ]


def _shown_samples(samples: Samples) -> Iterator[dict[str, Any]]:
    """Yield the rows of every row set; the first with a boundary inside and the first with targets are unfolded."""
    waiting = {True, False}
    for path, rows in samples.row_sets.items():
        shown = []
        for sample in rows:
            masked = sample.masked_text is not None
            unfold = masked in waiting and (masked or len(sample.spans) > 1)
            waiting -= {masked} if unfold else set()
            shown.append(_shown_sample(sample, unfold))
        if shown:
            yield {"path": path, "rows": shown}


def _shown_sample(sample: Sample, unfold: bool) -> ShownSample:
    return ShownSample(
        f"{sample.row:,}",
        sample_facts(sample),
        strip(sample.spans, sample.tokens, WIDE),
        strip(sample.spans, sample.tokens, NARROW),
        [_shown_boundary(boundary) for boundary in sample.boundaries],
        list(sample.masked_text or []),
        unfold,
    )


def sample_facts(sample: Sample) -> str:
    """Return what a row is, in words."""
    words = f"{sample.tokens:,} tokens, {counted(len(sample.spans), 'document')}"
    return f"{words}, {sample.domain}" if sample.domain else words


def _shown_boundary(boundary: SampleBoundary) -> ShownBoundary:
    return ShownBoundary(
        f"{boundary.position:,}",
        _parts(boundary.before, boundary.before_special),
        _parts(boundary.after, boundary.after_special),
    )


def _parts(text: str, special: Sequence[tuple[int, int]]) -> list[MaskedPart]:
    """Cut a text at its special tokens."""
    parts, position = [], 0
    for start, end in special:
        parts += [MaskedPart(text=text[position:start], target=False)] if start > position else []
        parts.append(MaskedPart(text=text[start:end], target=False, special=True))
        position = end
    return [*parts, MaskedPart(text=text[position:], target=False)] if position < len(text) else parts
