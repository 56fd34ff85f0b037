"""What the pages are made of: figures at two widths, headline numbers, and the templates under ``page/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

_PAGE = Path(__file__).parent / "page"

WIDE, HALF, NARROW = 1032.0, 500.0, 360.0
"""Widths in pixels: the page, half of it, a phone. Every figure is drawn twice, so that type never shrinks."""


@dataclass(frozen=True)
class LegendEntry:
    """A swatch and what it stands for."""

    swatch: Markup
    label: str


@dataclass(frozen=True)
class Figure:
    """A chart at two widths with its words.

    Attributes:
        title: What is shown, as a heading.
        caption: How it was measured.
        wide: SVG for a screen.
        narrow: SVG for a phone.
        legend: Empty where labels are on the chart itself.
    """

    title: str
    caption: str
    wide: Markup
    narrow: Markup
    legend: list[LegendEntry] = field(default_factory=list)


@dataclass(frozen=True)
class Tile:
    """One headline number with what it means."""

    value: str
    title: str
    detail: str


def render_page(template: str, styles: Sequence[str], **values: Any) -> str:
    """Return a page that loads nothing, runs no script, and escapes every string it was given.

    Args:
        template: File under ``page/``.
        styles: CSS files under ``page/``, which go into the page.
        values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = "".join((_PAGE / name).read_text("utf-8") for name in styles)
    return environment.get_template(template).render(style=Markup(style), **values)  # noqa: S704 - our own CSS
