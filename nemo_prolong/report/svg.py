"""SVG as escaped markup. Colours and fonts are the page's CSS classes, so a chart follows the reader's theme."""

from __future__ import annotations

from markupsafe import Markup, escape

NUM_STYLES = 6
"""Colours and marker shapes there are; the seventh series starts over."""


def tag(name: str, *children: str, **attributes: float | str) -> Markup:
    """Return an element; children that are not markup are escaped, and so is every attribute.

    Args:
        name: Element name.
        children: Text or markup.
        attributes: ``class_`` is class, other underscores are dashes; numbers are rounded to 0.01 pixel.
    """
    pairs = [f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"' for key, value in attributes.items()]
    inside = "".join(str(escape(child)) for child in children)
    element = f"<{name}{''.join(pairs)}>{inside}</{name}>" if inside else f"<{name}{''.join(pairs)}/>"
    return Markup(element)  # noqa: S704 - every part of it was escaped above


def _text(value: float | str) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, anchor: str = "start", class_: str = "") -> Markup:
    """Return a line of text whose baseline is at ``y``."""
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, **({"class_": class_} if class_ else {}))


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def polyline(points: list[tuple[float, float]], class_: str) -> Markup:
    """Return an open line through ``points`` in pixels."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def marker(style: int, x: float, y: float, title: str, hollow: bool = False, size: float = 4.5) -> Markup:
    """Return the marker of series ``style`` with a hover text: shapes differ too, for who cannot tell the colours."""
    class_ = f"mark {'hollow' if hollow else 'solid'} s{style % NUM_STYLES}"
    shape = style % NUM_STYLES
    if shape == 0:
        return tag("circle", tag("title", title), cx=float(x), cy=float(y), r=size, class_=class_)
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        3: [(0, -1.2), (1.2, 0.9), (-1.2, 0.9)],
        4: [(0, 1.2), (1.2, -0.9), (-1.2, -0.9)],
        5: [(-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
            (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)],
    }[shape]  # fmt: skip
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return tag("polygon", tag("title", title), points=points, class_=class_)


def picture(width: float, height: float, description: str, *children: Markup) -> Markup:
    """Return the SVG itself; ``description`` is what a screen reader says."""
    return tag(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=description, class_="chart"
    )
