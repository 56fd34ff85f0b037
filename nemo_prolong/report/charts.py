"""The two kinds of chart a report has: lines over an axis, and horizontal bars. Both know only numbers and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from nemo_prolong.report import svg
from nemo_prolong.report.scales import Scale

FONT_PIXELS = 12.5
AXIS_HEIGHT = 42.0
TITLE_HEIGHT = 26.0


@dataclass(frozen=True)
class Point:
    """A place on a chart, its hover text, and whether its marker is hollow."""

    x: float
    y: float
    title: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        style: Which colour and marker.
        points: Where it goes.
        markers: Draw a marker on every point. Otherwise hover texts lie on invisible spots.
        line: CSS class of the line, which is ``curve``, ``faint`` or ``dashed``. Empty draws none.
    """

    style: int
    points: Sequence[Point]
    markers: bool = False
    line: str = "curve"


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis, e.g. one stage."""

    start: float
    end: float
    label: str
    style: int


@dataclass(frozen=True)
class Axis:
    """One axis with its title, range and ticks. ``grid`` draws a line at every tick."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def scale(self, start: float, stop: float) -> Scale:
        """Return the scale from pixel ``start`` to pixel ``stop``."""
        return Scale(self.low, self.high, start, stop, self.ticks, self.log)


@dataclass(frozen=True)
class LineChart:
    """Lines over two axes, optionally with bands and a dashed reference."""

    description: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    bands: Sequence[Band] = field(default=())

    def render(self, width: float, height: float) -> Markup:
        """Return the chart as SVG of this size in pixels."""
        left = 14 + max(len(label) for _, label in self.y.ticks) * FONT_PIXELS * 0.58
        top = TITLE_HEIGHT + (22 if self.bands else 0)
        x = self.x.scale(left, width - 14)
        y = self.y.scale(height - AXIS_HEIGHT, top)
        parts = [
            svg.text(0, 14, self.y.title, class_="axis-title"),
            *self._bands(x, top, height - AXIS_HEIGHT),
            *_grid(x, y, width - 14, left),
            svg.text(width - 14, height - 4, self.x.title, "end", "axis-title"),
        ]
        for series in self.series:
            parts += _draw_series(series, x, y)
        return svg.picture(width, height, self.description, *parts)

    def _bands(self, x: Scale, top: float, bottom: float) -> list[Markup]:
        parts = []
        for number, band in enumerate(self.bands):
            start, end = x(band.start), x(band.end)
            parts.append(
                svg.tag(
                    "rect", svg.tag("title", band.label), x=start, y=top - 22, width=end - start,
                    height=bottom - top + 22, class_="band shaded" if number % 2 else "band",
                )
            )  # fmt: skip
            if number:
                parts.append(svg.line(start, top - 22, start, bottom, "boundary"))
            label = _fitting(band.label, end - start - 10)
            parts.append(svg.text(start + 6, top - 7, label, class_=f"band-label s{band.style % svg.NUM_STYLES}"))
        return parts


def _fitting(label: str, width: float) -> str:
    """Return the longest of the label, its first word, or nothing that fits ``width`` pixels."""
    candidates = (label, label.split(" ")[0], "")
    return next(text for text in candidates if len(text) * FONT_PIXELS * 0.56 <= width or not text)


def _grid(x: Scale, y: Scale, right: float, left: float) -> list[Markup]:
    """Draw both axes: horizontal grid lines, short ticks below, labels."""
    parts = []
    for value, label in y.ticks:
        parts.append(svg.line(left, y(value), right, y(value), "grid"))
        parts.append(svg.text(left - 7, y(value) + 4, label, "end", "tick"))
    for value, label in x.ticks:
        parts.append(svg.line(x(value), y.start, x(value), y.start + 5, "tickmark"))
        parts.append(svg.text(x(value), y.start + 18, label, "middle", "tick"))
    parts.append(svg.line(left, y.start, right, y.start, "axis"))
    return parts


def _draw_series(series: Series, x: Scale, y: Scale) -> list[Markup]:
    """Draw a line and its markers; points outside the axis are drawn at its edge rather than outside the chart."""
    low, high = min(y.low, y.high), max(y.low, y.high)
    places = [(x(point.x), y(min(max(point.y, low), high))) for point in series.points]
    parts = [svg.polyline(places, f"{series.line} s{series.style % svg.NUM_STYLES}")] if series.line else []
    for point, (px, py) in zip(series.points, places, strict=True):
        if series.markers:
            parts.append(svg.marker(series.style, px, py, point.title, point.hollow))
        elif point.title:
            parts.append(svg.tag("circle", svg.tag("title", point.title), cx=px, cy=py, r=7, class_="spot"))
    return parts


@dataclass(frozen=True)
class Bar:
    """One bar: its length, and the range a whisker shows."""

    label: str
    style: int
    value: float
    low: float
    high: float
    text: str
    title: str


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from zero, each under its label."""

    description: str
    axis: Axis
    bars: Sequence[Bar]

    def render(self, width: float, row_height: float = 46) -> Markup:
        """Return the chart as SVG of this width in pixels; the height follows the number of bars."""
        bottom = row_height * len(self.bars) + 4
        x = self.axis.scale(1, width - 14)
        parts = [svg.line(x(value), 4, x(value), bottom, "grid") for value, _ in x.ticks]
        for number, bar in enumerate(self.bars):
            parts += self._bar(bar, x, number * row_height)
        anchors = ["start" if x(value) < 10 else "middle" for value, _ in x.ticks]
        parts += [
            svg.text(x(value), bottom + 16, label, anchor, "tick")
            for (value, label), anchor in zip(x.ticks, anchors, strict=True)
        ]
        parts.append(svg.line(1, 4, 1, bottom, "axis"))
        parts.append(svg.text(width - 14, bottom + 36, self.axis.title, "end", "axis-title"))
        return svg.picture(width, bottom + 42, self.description, *parts)

    def _bar(self, bar: Bar, x: Scale, top: float) -> list[Markup]:
        middle = top + 32
        return [
            svg.text(8, top + 18, bar.label, class_="bar-label"),
            svg.text(x.stop, top + 18, bar.text, "end", "bar-value"),
            svg.tag(
                "rect", svg.tag("title", bar.title), x=x.start, y=top + 25, width=max(x(bar.value) - x.start, 1.0),
                height=14, class_=f"bar s{bar.style % svg.NUM_STYLES}",
            ),
            svg.line(x(bar.low), middle, x(bar.high), middle, "whisker"),
            svg.line(x(bar.low), middle - 4, x(bar.low), middle + 4, "whisker"),
            svg.line(x(bar.high), middle - 4, x(bar.high), middle + 4, "whisker"),
        ]  # fmt: skip
