"""The figures of a data card: which numbers go on which chart, and what the reader is told about them."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from nemo_prolong.data.epochs import MAX_EPOCHS
from nemo_prolong.records.data_manifest import DataManifest, DomainSplit, RowSetFacts, StageFacts
from nemo_prolong.report import numbers
from nemo_prolong.report.charts import Axis
from nemo_prolong.report.data_card.charts import (
    HistogramChart,
    HistogramSeries,
    Segment,
    StackedBar,
    StackedBars,
    share_axis,
    swatch,
)
from nemo_prolong.report.data_card.tables import (
    bucket_words,
    drop_reasons,
    fill_words,
    reason_words,
    taken_tokens,
)
from nemo_prolong.report.pages import HALF, NARROW, WIDE, Figure, LegendEntry
from nemo_prolong.report.scales import token_ticks
from nemo_prolong.units import format_tokens

_DOCUMENTS, _TOKENS, _REPEATED, _OUTLINE = 0, 2, 1, -1
_REASON_STYLES = (1, 4, 5, 3, 0)


# ---- document lengths -----------------------------------------------------------------------------------------------


def length_figures(manifest: DataManifest) -> list[Figure]:
    """Draw the lengths of every domain's documents; all on one scale, so that they compare."""
    domains = [(name, splits.get("train") or next(iter(splits.values()))) for name, splits in manifest.domains.items()]
    domains = [(name, facts) for name, facts in domains if facts.length_histogram.buckets]
    if not domains:
        return []
    first = min(facts.length_histogram.buckets[0] for _, facts in domains)
    last = max(facts.length_histogram.buckets[-1] for _, facts in domains)
    buckets = range(first, last + 1)
    high = max(max(share) for _, facts in domains for share in _shares(facts, buckets))
    return [_length_figure(name, facts, buckets, high) for name, facts in domains]


def length_legend() -> list[LegendEntry]:
    """Return what the two colours of the length figures stand for."""
    return [LegendEntry(swatch(_DOCUMENTS), "share of documents"), LegendEntry(swatch(_TOKENS), "share of tokens")]


def _shares(facts: DomainSplit, buckets: range) -> tuple[list[float], list[float]]:
    """Return each bucket's share of the documents and of the tokens."""
    counted = (facts.length_histogram.documents, facts.length_histogram.tokens)
    documents, tokens = (
        [counts[bucket] / max(sum(counts), 1) if bucket < len(counts) else 0.0 for bucket in buckets]
        for counts in counted
    )
    return documents, tokens


def _length_figure(name: str, facts: DomainSplit, buckets: range, high: float) -> Figure:
    documents, tokens = _shares(facts, buckets)
    series = [
        _length_series(_DOCUMENTS, documents, "documents", buckets, name),
        _length_series(_TOKENS, tokens, "tokens", buckets, name),
    ]
    edges = [format_tokens(2**bucket) for bucket in (*buckets, buckets.stop)]
    chart = HistogramChart(
        f"Document lengths of {name}", "Document length, tokens", edges, share_axis("Share", high, 4), series
    )
    caption = f"{numbers.count(facts.documents)} documents, {numbers.tokens(facts.tokens)} tokens."
    return Figure(name, caption, chart.render(HALF, 230), chart.render(NARROW, 220))


def _length_series(style: int, shares: list[float], what: str, buckets: range, name: str) -> HistogramSeries:
    titles = [
        f"{name}, {bucket_words(bucket)} tokens: {numbers.percent(share)} of the {what}"
        for bucket, share in zip(buckets, shares, strict=True)
    ]
    return HistogramSeries(style, shares, titles)


# ---- stages ---------------------------------------------------------------------------------------------------------


def stage_figure(manifest: DataManifest, name: str, stage: StageFacts) -> Figure:
    """Draw what a stage takes of every row set against what is there."""
    taken = {path: taken_tokens(manifest, stage, path) for path in stage.row_sets}
    # A domain may hold far more than any stage takes; its outline then runs out of the chart.
    high = 1.15 * max(max(taken.values()), 1)
    bars = [_stage_bar(stage, path, tokens, manifest.row_sets[path]) for path, tokens in taken.items()]
    repeats = any(entry.epochs > 1 for entry in stage.row_sets.values())
    legend = [LegendEntry(swatch(_TOKENS), "taken once")]
    legend += [LegendEntry(swatch(_REPEATED), "taken again")] if repeats else []
    legend += [LegendEntry(swatch(_OUTLINE), "there, not taken")]

    def draw(width: float, num_ticks: int) -> Markup:
        axis = Axis("Tokens", 0, high, token_ticks(int(high), num_ticks))
        return StackedBars(f"Tokens that {name} takes", axis, bars).render(width)

    return Figure(
        f"{name}: {numbers.tokens(stage.tokens)} tokens",
        "",
        draw(WIDE, 10),
        draw(NARROW, 4),
        legend,
    )


def _stage_bar(stage: StageFacts, path: str, taken: int, row_set: RowSetFacts) -> StackedBar:
    entry = stage.row_sets[path]
    once = min(taken, row_set.tokens)
    words = f"{path}: {numbers.tokens(taken)} taken of {numbers.tokens(row_set.tokens)}, {entry.epochs:.2f} epochs"
    segments = [
        Segment(once, _TOKENS, words),
        Segment(taken - once, _REPEATED, words),
        Segment(row_set.tokens - once, _OUTLINE, words),
    ]
    warning = " \u26a0" if entry.epochs > MAX_EPOCHS else ""
    text = f"{numbers.percent(entry.proportion)} \u00b7 {entry.epochs:.2f} epochs{warning}"
    return StackedBar(path, text, segments)


# ---- rows -----------------------------------------------------------------------------------------------------------


def packing_figure(manifest: DataManifest) -> Figure:
    """Draw which share of its input is in the rows of every row set, and why the rest is not."""
    reasons = drop_reasons(manifest)
    styles = {reason: _REASON_STYLES[number % len(_REASON_STYLES)] for number, reason in enumerate(reasons)}
    bars = [_packing_bar(path, entry, styles) for path, entry in manifest.row_sets.items()]
    legend = [LegendEntry(swatch(_TOKENS), "in rows")]
    legend += [LegendEntry(swatch(style), reason_words(reason)) for reason, style in styles.items()]
    return _share_figure(
        "What became of the tokens",
        "Share of the tokens that a row set was given; every one is in a row or counted under a reason. Fill is the "
        "share of row places that hold a token.",
        "Share of the input",
        bars,
        legend,
    )


def _packing_bar(path: str, entry: RowSetFacts, styles: dict[str, int]) -> StackedBar:
    total = max(entry.input_tokens, 1)
    segments = [Segment(entry.tokens / total, _TOKENS, f"{path}: {numbers.percent(entry.tokens / total)} in rows")]
    for reason, style in styles.items():
        dropped = entry.dropped_tokens.get(reason, 0)
        title = f"{path}: {numbers.percent(dropped / total)} dropped, {reason_words(reason)} ({dropped:,} tokens)"
        segments.append(Segment(dropped / total, style, title))
    text = f"{fill_words(entry.tokens / total)} kept \u00b7 fill {fill_words(entry.fill)}"
    return StackedBar(path, text, segments)


def attention_figure(manifest: DataManifest) -> Figure:
    """Draw the cost of document attention against rows of one document."""
    bars = []
    for path, entry in manifest.row_sets.items():
        share = entry.attention_share
        mean = numbers.tokens(round(entry.sum_squared_lengths / entry.tokens))
        title = f"{path}: {numbers.percent(share)} of a full row, a token's document has {mean} tokens on average"
        text = f"{numbers.percent(share)} of {format_tokens(entry.seq_length)}\u00b2"
        bars.append(StackedBar(path, text, [Segment(share, _TOKENS, title)]))
    return _share_figure(
        "Attention cost",
        "Sum of squared document lengths over that of full rows of one document each: tokens attend within their "
        "document only, so this is the share of a full row's attention that is computed.",
        "Share of a full row of one document",
        bars,
        [],
    )


def _share_figure(
    title: str, caption: str, axis_title: str, bars: Sequence[StackedBar], legend: list[LegendEntry]
) -> Figure:
    wide, narrow = (
        StackedBars(title, share_axis(axis_title, 1.0, ticks), bars).render(width)
        for width, ticks in ((WIDE, 10), (NARROW, 4))
    )
    return Figure(title, caption, wide, narrow, legend)
