"""The figures of a report: which numbers go on which chart, and what the reader is told about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from markupsafe import Markup

from nemo_prolong.records.evaluation import PerplexityResult, RecallEntry, RecallResult
from nemo_prolong.records.run_log import StepRecord
from nemo_prolong.report import numbers, svg
from nemo_prolong.report.charts import Axis, Band, Bar, BarChart, LineChart, Point, Series
from nemo_prolong.report.pages import HALF, NARROW, WIDE, Figure, LegendEntry
from nemo_prolong.report.scales import log_ticks, round_step, round_ticks, token_ticks
from nemo_prolong.report.training.read import EvaluatedModel, Lineage, StageRun
from nemo_prolong.report.training.summary import WARMUP_STEPS, median_tokens_per_second, steady_throughput
from nemo_prolong.report.training.telemetry import WINDOW_FRACTION, WINDOW_STEPS, changes, last_position
from nemo_prolong.text import counted
from nemo_prolong.units import format_tokens

MAX_CURVE_POINTS = 400
SMOOTHING_FRACTION = 0.05
"""Share of a stage's steps that one point of the smoothed loss averages."""


# ---- loss -----------------------------------------------------------------------------------------------------------


def loss_figure(stages: Sequence[StageRun]) -> Figure | None:
    """Draw the training loss of all stages over the tokens trained so far; None if no stage has a step."""
    series: list[Series] = []
    bands: list[Band] = []
    offset = 0
    for style, stage in enumerate(stages):
        steps = [step for step in stage.steps if math.isfinite(step.loss)]
        if not steps:
            continue
        label = f"{stage.label} \u00b7 {format_tokens(stage.manifest.seq_length)}"
        bands.append(Band(offset, offset + steps[-1].consumed_train_tokens, label, style))
        series += _loss_series(stage, steps, style, offset)
        offset += steps[-1].consumed_train_tokens
    if not series:
        return None
    y = _linear_axis("Loss, nats per target token", [point.y for line in series for point in line.points])

    def draw(width: float, height: float, num_ticks: int) -> Markup:
        x = Axis("Real tokens trained, all stages in a row", 0, offset, token_ticks(offset, num_ticks))
        return LineChart("Training loss of every stage", x, y, series, bands).render(width, height)

    return Figure(
        "Training loss",
        "Thin: every step (of long stages, the lowest and highest per stretch). Thick: average over "
        f"{SMOOTHING_FRACTION:.0%} of the stage's steps, at least 3. Hollow markers: loss on held-out validation rows. "
        "Each stage trains on data of its own, and SFT counts the loss of answers only, so levels compare within a "
        "stage; across a boundary, use perplexity below.",
        draw(WIDE, 400, 10),
        draw(NARROW, 300, 4),
        [LegendEntry(_swatch(style, "line"), stage.label) for style, stage in enumerate(stages) if stage.steps],
    )


def _loss_series(stage: StageRun, steps: list[StepRecord], style: int, offset: int) -> list[Series]:
    """Return the raw line, the smoothed line with hover texts, and the validations."""
    raw = [Point(offset + step.consumed_train_tokens, step.loss) for step in _extremes(steps, MAX_CURVE_POINTS)]
    smoothed = smooth([step.loss for step in steps])
    stride = math.ceil(len(steps) / MAX_CURVE_POINTS)
    chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
    curve = [
        Point(
            offset + steps[i].consumed_train_tokens,
            smoothed[i],
            f"{stage.label} step {steps[i].step}: loss {steps[i].loss:.3f}, average {smoothed[i]:.3f}, "
            f"{numbers.tokens(steps[i].consumed_train_tokens)} tokens",
        )
        for i in chosen
    ]
    at_step = {0: 0} | {step.step: step.consumed_train_tokens for step in steps}
    validations = [
        Point(
            offset + at_step[v.step],
            v.val_loss,
            f"{stage.label} step {v.step}: validation loss {v.val_loss:.3f}",
            hollow=True,
        )
        for v in stage.validations
        if v.step in at_step and math.isfinite(v.val_loss)
    ]
    return [
        Series(style, raw, line="faint"),
        Series(style, curve),
        Series(style, validations, markers=True, line=""),
    ]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the line fitted to the values around each value, which is their mean where the window is whole.

    A mean alone would lag behind at the start of a stage, where the loss falls fastest.
    """
    half = max(1, round(len(values) * SMOOTHING_FRACTION / 2))
    result = []
    for index in range(len(values)):
        begin, end = max(0, index - half), min(len(values), index + half + 1)
        window = values[begin:end]
        if end - begin == 2 * half + 1 or len(window) == 1:
            result.append(statistics.fmean(window))
        else:
            fit = statistics.linear_regression(range(begin, end), window)
            result.append(fit.intercept + fit.slope * index)
    return result


def _extremes(steps: list[StepRecord], at_most: int) -> list[StepRecord]:
    """Thin ``steps`` to the lowest and highest of each stretch, so that no spike is lost; first and last stay."""
    if len(steps) <= at_most:
        return steps
    stretch = math.ceil(2 * len(steps) / at_most)
    kept = {steps[0].step: steps[0], steps[-1].step: steps[-1]}
    for begin in range(0, len(steps), stretch):
        part = steps[begin : begin + stretch]
        for step in (min(part, key=lambda s: s.loss), max(part, key=lambda s: s.loss)):
            kept[step.step] = step
    return [kept[number] for number in sorted(kept)]


def position_figure(stages: Sequence[StageRun]) -> Figure | None:
    """Draw the training loss by position at the end of every stage; None where no stage recorded it."""
    series: list[Series] = []
    for style, stage in enumerate(stages):
        points = [
            Point(
                last_position(change.name) + 1,
                change.last_loss,
                f"{stage.label}, positions {change.name}: loss {change.last_loss:.3f}, "
                f"{numbers.loss(change.first_loss)} at the start",
            )
            for change in changes(stage.steps, "loss_by_position")
            if change.last_loss is not None and math.isfinite(change.last_loss)
        ]
        series.append(Series(style, sorted(points, key=lambda point: point.x), markers=True))
    points = [point for line in series for point in line.points]
    if not points:
        return None
    ends = sorted({int(point.x) for point in points})
    x = Axis("Position of the predicted token, up to", 0.8 * ends[0], 1.25 * ends[-1], _power_ticks(ends), log=True)
    y = _linear_axis("Loss, nats per target token", [point.y for point in points])
    chart = LineChart("Training loss by position, at the end of every stage", x, y, series)
    return Figure(
        "Training loss by position",
        f"Mean over the last {WINDOW_STEPS} steps of a stage or {WINDOW_FRACTION:.0%} of them, by how far into its "
        "document the predicted token is. A stage that learns to use its context falls to the right.",
        chart.render(WIDE, 320),
        chart.render(NARROW, 280),
        [LegendEntry(_swatch(style), stage.label) for style, stage in enumerate(stages) if series[style].points],
    )


def _power_ticks(ends: Sequence[int]) -> Sequence[tuple[float, str]]:
    """Return powers of two among ``ends``, at most about eight of them."""
    powers = [end for end in ends if end & (end - 1) == 0] or list(ends)
    stride = math.ceil(len(powers) / 8)
    return [(end, format_tokens(end)) for end in powers[::-1][::stride]][::-1]


# ---- evaluations ----------------------------------------------------------------------------------------------------


def perplexity_figure(models: Sequence[EvaluatedModel]) -> Figure | None:
    """Draw perplexity by position, a line per model; None if no model has results."""
    measured = [(style, model, model.perplexity) for style, model in enumerate(models) if model.perplexity]
    spans = sorted({bucket.span for _, _, result in measured for bucket in result.buckets})
    series = []
    for place, (style, model, result) in enumerate(measured):
        points = [
            Point(
                spans.index(bucket.span) + _dodge(place, len(measured)),
                bucket.perplexity,
                f"{model.label}, positions {numbers.span(*bucket.span)}: perplexity "
                f"{numbers.significant(bucket.perplexity)} ({bucket.tokens:,} tokens)",
                hollow=model.is_beyond_training(bucket.end),
            )
            for bucket in result.buckets
            if bucket.perplexity is not None
        ]
        series.append(Series(style, points, markers=True))
    values = [point.y for line in series for point in line.points]
    if not values:
        return None
    x = _category_axis("Position of the predicted token in its document", [numbers.span(*span) for span in spans])
    y = _log_axis("Perplexity (log scale)", values)
    chart = LineChart("Perplexity by position for every model", x, y, series)
    return Figure(
        "Perplexity by position",
        f"Lower is better. {_documents([result for _, _, result in measured])} Each document is scored alone from its "
        "first token. Hollow markers: positions beyond the longest row the model was trained on.",
        chart.render(WIDE, 400),
        chart.render(NARROW, 300),
        [LegendEntry(_swatch(style), model.label) for style, model, _ in measured],
    )


def _documents(results: Sequence[PerplexityResult]) -> str:
    """Return which documents were scored, and a warning where models did not see the same ones."""
    sources = sorted({(result.data, result.documents) for result in results})
    named = "; ".join(f"{documents} documents of {data}" for data, documents in sources)
    return f"{named}." if len(sources) == 1 else f"Not comparable, the models were scored on different data: {named}."


Recalled = tuple[int, EvaluatedModel, RecallResult]
"""Style, model, and its results."""


def recall_figures(models: Sequence[EvaluatedModel]) -> list[Figure]:
    """Draw exact match and answer loss by prompt length, a line per model; empty if no model has results."""
    measured = [(style, model, model.recall) for style, model in enumerate(models) if model.recall]
    if not measured:
        return []
    entries = [entry for _, _, result in measured for entry in result.lengths]
    lengths = sorted({entry.length for entry in entries})
    x = _category_axis("Prompt length, tokens", [format_tokens(length) for length in lengths])
    legend = [LegendEntry(_swatch(style), model.label) for style, model, _ in measured]
    exact = _recall_series(
        measured, lengths, lambda e: (e.exact_match, f"exact match {numbers.percent(e.exact_match)}")
    )
    share = Axis("Exact match", 0, 1, [(0, "0%"), (0.25, "25%"), (0.5, "50%"), (0.75, "75%"), (1, "100%")])
    loss = _recall_series(measured, lengths, lambda e: (e.answer_loss, f"answer loss {e.answer_loss:.2f}"))
    guess = _guessing_series(entries, lengths)
    samples = _range_of(entry.samples for entry in entries)
    y = _linear_axis("Nats per answer token", [p.y for line in [*loss, *guess] for p in line.points], zero=True)
    return [
        _half_figure(
            "Recall: exact match",
            f"Higher is better. Share of {samples} prompts per length whose value greedy decoding writes in full. Key "
            f"and four-digit value stand in a JSON object, at evenly spread depths.{_nobody_answers(entries)}",
            LineChart("Recall, exact match by prompt length", x, share, exact),
            legend,
        ),
        _half_figure(
            "Recall: loss of the answer",
            "Lower is better, and it moves long before exact match does. Dashed: the loss of knowing that a value is "
            "four digits and guessing them. Hollow markers: prompts longer than any row the model was trained on.",
            LineChart("Recall, answer loss by prompt length", x, y, [*guess, *loss]),
            [*legend, LegendEntry(_swatch(0, "dashed"), "guessing")] if guess else legend,
        ),
    ]


def _nobody_answers(entries: Sequence[RecallEntry]) -> str:
    """Return a sentence for a reader who sees every line on the axis."""
    if any(entry.exact_match > 0 for entry in entries):
        return ""
    return " None of these models answers a single prompt: copying a value takes far more training than they had."


def _recall_series(
    measured: Sequence[Recalled], lengths: list[int], show: Callable[[RecallEntry], tuple[float, str]]
) -> list[Series]:
    """Return a line per model; ``show`` gives the value of an entry and its words."""
    series = []
    for place, (style, model, result) in enumerate(measured):
        points = []
        for entry in sorted(result.lengths, key=lambda entry: entry.length):
            value, words = show(entry)
            x = lengths.index(entry.length) + _dodge(place, len(measured))
            title = f"{model.label}, {format_tokens(entry.length)} tokens: {words}"
            points.append(Point(x, value, title, hollow=model.is_beyond_training(entry.length)))
        series.append(Series(style, points, markers=True))
    return series


def _guessing_series(entries: Sequence[RecallEntry], lengths: list[int]) -> list[Series]:
    """Return the dashed line of a guessed value, or nothing if no result has it."""
    chance = {entry.length: entry.chance_loss for entry in entries if entry.chance_loss is not None}
    points = [Point(lengths.index(n), value, f"guessing: {value:.2f}") for n, value in sorted(chance.items())]
    return [Series(0, points, line="dashed")] if points else []


# ---- throughput -----------------------------------------------------------------------------------------------------


def throughput_figure(stages: Sequence[StageRun]) -> Figure | None:
    """Draw the median throughput of every stage; None if no stage has a step."""
    bars = [bar for style, stage in enumerate(stages) if (bar := _throughput_bar(style, stage)) is not None]
    if not bars:
        return None
    high = max(bar.high for bar in bars) * 1.02

    def draw(width: float, num_ticks: int) -> Markup:
        axis = Axis("Real tokens per second", 0, high, [(v, f"{v:,.0f}") for v in round_ticks(0, high, num_ticks)])
        return BarChart("Throughput of every stage", axis, bars).render(width)

    return Figure(
        "Throughput",
        f"Median over the steps after the first {WARMUP_STEPS}, all ranks together, padding not counted. Whisker: from "
        "the 10th to the 90th percentile of steps.",
        draw(WIDE, 10),
        draw(NARROW, 4),
    )


def _throughput_bar(style: int, stage: StageRun) -> Bar | None:
    rates = sorted(steady_throughput(stage))
    median = median_tokens_per_second(stage)
    if not rates or median is None:
        return None
    low, high = (rates[round(q * (len(rates) - 1))] for q in (0.1, 0.9))
    where = f" \u00b7 {counted(stage.manifest.world_size, 'rank')}"
    label = f"{stage.label} \u00b7 {format_tokens(stage.manifest.seq_length)}{where}"
    title = f"{stage.label}: median {median:,.0f} tokens/s over {len(rates)} steps, {low:,.0f} to {high:,.0f}"
    return Bar(label, style, median, low, high, f"{median:,.0f} tokens/s", title)


# ---- shared ---------------------------------------------------------------------------------------------------------


def _half_figure(title: str, caption: str, chart: LineChart, legend: list[LegendEntry]) -> Figure:
    return Figure(title, caption, chart.render(HALF, 320), chart.render(NARROW, 280), legend)


def _category_axis(title: str, labels: Sequence[str]) -> Axis:
    return Axis(title, -0.5, len(labels) - 0.5, list(enumerate(labels)))


def _dodge(place: int, num_series: int) -> float:
    """Return a small shift on a category axis, so that equal values of several models stay visible."""
    return 0.08 * (place - (num_series - 1) / 2)


def _linear_axis(title: str, values: Sequence[float], zero: bool = False) -> Axis:
    """Return an axis that starts and ends on ticks around ``values``."""
    low, high = 0.0 if zero else min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = round_step(high - low, 6)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(title, low, high, [(v, f"{v:.{decimals}f}") for v in round_ticks(low, high, 6)])


def _log_axis(title: str, values: Sequence[float]) -> Axis:
    """Return a logarithmic axis with a little room around ``values``."""
    low, high = min(values) / 1.25, max(values) * 1.25
    return Axis(title, low, high, [(v, numbers.tick(v)) for v in log_ticks(low, high, 8)], log=True)


def _range_of(counts: Iterable[int]) -> str:
    values = sorted(counts)
    return f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _swatch(style: int, kind: str = "marker") -> Markup:
    """Return a little picture for the legend: a line with its marker, a line, or the dashed reference."""
    css = "dashed" if kind == "dashed" else "curve"
    parts = [svg.polyline([(1, 7), (27, 7)], f"{css} s{style % svg.NUM_STYLES}")]
    if kind == "marker":
        parts.append(svg.marker(style, 14, 7, ""))
    return svg.tag("svg", *parts, viewBox="0 0 28 14", width="28", height="14", aria_hidden="true")


def figures_of(lineage: Lineage) -> dict[str, Any]:
    """Return every figure by name; the export is left out of charts, because its line would hide its run's."""
    models = [stage.evaluated for stage in lineage.stages]
    return {
        "loss": loss_figure(lineage.stages),
        "position": position_figure(lineage.stages),
        "perplexity": perplexity_figure(models),
        "recall": recall_figures(models),
        "throughput": throughput_figure(lineage.stages),
    }
