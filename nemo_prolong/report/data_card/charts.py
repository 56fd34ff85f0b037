"""Charts of a data card that a training report does not have: histograms, stacked bars, and a row as a strip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from nemo_prolong.report import numbers, svg
from nemo_prolong.report.charts import Axis
from nemo_prolong.report.scales import round_step, round_ticks

_CHARACTER_PIXELS = 7.0
_ROW_HEIGHT = 42
_STRIP_HEIGHT = 26.0


def share_axis(title: str, high: float, at_most: int) -> Axis:
    """Return an axis of fractions from 0 to the first tick at or above ``high``, labelled in percent."""
    step = round_step(max(high, 0.01), at_most)
    top = math.ceil(high / step - 1e-9) * step if high > 0 else step
    return Axis(title, 0, top, [(value, f"{100 * value:g}%") for value in round_ticks(0, top, at_most)])


@dataclass(frozen=True)
class HistogramSeries:
    """Bars of one colour: value and hover text per bucket."""

    style: int
    values: Sequence[float]
    titles: Sequence[str]


@dataclass(frozen=True)
class HistogramChart:
    """Bars side by side in buckets.

    Attributes:
        description: For a screen reader.
        x_title: What the buckets are.
        edges: Label of every bucket's lower edge, and of the last one's upper edge.
        y: Axis of the values.
        series: As many values as buckets each.
    """

    description: str
    x_title: str
    edges: Sequence[str]
    y: Axis
    series: Sequence[HistogramSeries]

    def render(self, width: float, height: float) -> Markup:
        """Return the chart as SVG of this size in pixels."""
        left, right, top, bottom = 44.0, width - 24, 26.0, height - 42
        y = self.y.scale(bottom, top)
        bucket_width = (right - left) / (len(self.edges) - 1)
        parts = [svg.text(0, 14, self.y.title, class_="axis-title")]
        for value, label in self.y.ticks:
            parts.append(svg.line(left, y(value), right, y(value), "grid"))
            parts.append(svg.text(left - 7, y(value) + 4, label, "end", "tick"))
        stride = math.ceil(_CHARACTER_PIXELS * 6 / bucket_width)
        for number in range(0, len(self.edges), stride):
            x = left + number * bucket_width
            parts.append(svg.line(x, bottom, x, bottom + 5, "tickmark"))
            parts.append(svg.text(x, bottom + 18, self.edges[number], "middle", "tick"))
        bar_width = bucket_width * 0.84 / len(self.series)
        for place, series in enumerate(self.series):
            offset = left + bucket_width * 0.08 + place * bar_width
            for bucket, (value, title) in enumerate(zip(series.values, series.titles, strict=True)):
                if value > 0:
                    x = offset + bucket * bucket_width
                    parts.append(_bar(x, min(y(value), bottom - 1), bar_width, bottom, f"bar s{series.style}", title))
        parts.append(svg.line(left, bottom, right, bottom, "axis"))
        parts.append(svg.text(right, height - 4, self.x_title, "end", "axis-title"))
        return svg.picture(width, height, self.description, *parts)


def _bar(x: float, top: float, width: float, bottom: float, class_: str, title: str) -> Markup:
    return svg.tag(
        "rect", svg.tag("title", title), x=float(x), y=float(top), width=float(max(width, 0.5)),
        height=float(bottom - top), class_=class_,
    )  # fmt: skip


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar; ``style`` is its colour, -1 an outline."""

    value: float
    style: int
    title: str


@dataclass(frozen=True)
class StackedBar:
    """One row of stacked bars: segments from zero, under a label and a text.

    Attributes:
        label: What it is, on the left.
        text: Its numbers, on the right.
        segments: From left to right; cut at the end of the axis.
    """

    label: str
    text: str
    segments: Sequence[Segment] = field(default=())


@dataclass(frozen=True)
class StackedBars:
    """Horizontal stacked bars from zero."""

    description: str
    axis: Axis
    bars: Sequence[StackedBar]

    def render(self, width: float) -> Markup:
        """Return the chart as SVG of this width in pixels; the height follows the number of bars."""
        bottom = float(_ROW_HEIGHT * len(self.bars) + 4)
        x = self.axis.scale(1, width - 14)
        parts = [svg.line(x(value), 4, x(value), bottom, "grid") for value, _ in self.axis.ticks]
        for number, bar in enumerate(self.bars):
            top = number * _ROW_HEIGHT
            room = int((width - 30) / _CHARACTER_PIXELS) - len(bar.text)
            parts.append(svg.text(8, top + 18, _shortened(bar.label, room), class_="bar-label"))
            parts.append(svg.text(width - 14, top + 18, bar.text, "end", "bar-value"))
            start = 0.0
            for segment in bar.segments:
                stop = min(start + segment.value, self.axis.high)
                if stop > start:
                    class_ = "outline" if segment.style < 0 else f"bar s{segment.style % svg.NUM_STYLES}"
                    left = x(start)
                    parts.append(_bar(left, top + 24.0, max(x(stop) - left, 1), top + 37.0, class_, segment.title))
                start = stop
        for value, label in self.axis.ticks:
            anchor = "start" if x(value) < 10 else "end" if x(value) > width - 30 else "middle"
            parts.append(svg.text(x(value), bottom + 16, label, anchor, "tick"))
        parts.append(svg.line(1, 4, 1, bottom, "axis"))
        parts.append(svg.text(width - 14, bottom + 36, self.axis.title, "end", "axis-title"))
        return svg.picture(width, bottom + 42, self.description, *parts)


def _shortened(label: str, characters: int) -> str:
    return label if len(label) <= characters else f"{label[: max(characters - 1, 1)]}\u2026"


def strip(spans: Sequence[tuple[int, int]], tokens: int, width: float) -> Markup:
    """Draw a row as a strip: its documents in proportion, one shade after another, lengths where they fit.

    Args:
        spans: (start, end) of every document in tokens.
        tokens: Length of the row.
        width: Pixels.
    """
    parts = []
    scale = width / tokens
    for number, (start, end) in enumerate(spans):
        title = f"document {number + 1}: tokens {start:,} to {end:,}, {end - start:,} long"
        # A gap of one pixel is the boundary; where documents are narrower than that, the shades alone show them.
        x, extent = start * scale, (end - start) * scale
        gap = 1.0 if extent > 3 and number + 1 < len(spans) else 0.0
        class_ = f"document s2{' odd' if number % 2 else ''}"
        parts.append(_bar(x, 0, extent - gap, _STRIP_HEIGHT, class_, title))
        label = numbers.count(end - start)
        if extent > _CHARACTER_PIXELS * (len(label) + 2):
            parts.append(svg.text(x + extent / 2, _STRIP_HEIGHT / 2 + 4.5, label, "middle", "document-label"))
    return svg.picture(width, _STRIP_HEIGHT, f"A row of {len(spans)} documents", *parts)


def swatch(style: int) -> Markup:
    """Return a little square of one colour for a legend; -1 is an outline."""
    class_ = "outline" if style < 0 else f"bar s{style % svg.NUM_STYLES}"
    square = svg.tag("rect", x=1, y=1, width=12, height=12, class_=class_)
    return svg.tag("svg", square, viewBox="0 0 14 14", width="14", height="14", aria_hidden="true")
