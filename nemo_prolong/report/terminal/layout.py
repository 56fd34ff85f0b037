"""What the views share: the console they are printed on, tables, and lists of facts.

Text goes in as it is. It is neither read as markup, nor can it control the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from nemo_prolong.text import escaped

UNLIMITED_WIDTH = 10_000
"""Columns where nothing is to be wrapped, as in a pipe."""


def open_console(color: bool = True, piped_width: int = UNLIMITED_WIDTH) -> Console:
    """Return a console on standard output; a pipe, ``NO_COLOR`` and a false ``color`` get no control sequences.

    Args:
        color: Whether a terminal gets colours.
        piped_width: Columns where standard output is no terminal.
    """
    terminal = sys.stdout.isatty()
    color = color and terminal and "NO_COLOR" not in os.environ
    return Console(
        color_system="auto" if color else None,
        force_terminal=terminal,
        width=None if terminal else piped_width,
        highlight=False,
    )


def plain(text: str, style: str = "") -> Text:
    """Return text with its control characters written out."""
    return Text(escaped(text), style)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 0, indent: int = 0) -> Lines:
    """Return a table without rules, as wide as its cells: a terminal that is narrower wraps its lines.

    Args:
        head: Headings.
        rows: Cells, as many as headings.
        words: So many columns stand on the left of their cells, the others on the right.
        indent: Columns before every line.
    """
    result = Table(box=None, pad_edge=False, header_style="dim")
    for number, title in enumerate(head):
        result.add_column(title, justify="left" if number < words else "right")
    for row in rows:
        result.add_row(*map(plain, row))
    return Lines(result, indent, UNLIMITED_WIDTH)


def facts(values: Mapping[str, str]) -> Table:
    """Return names with their values, one to a line."""
    result = Table.grid(padding=(0, 2))
    result.add_column(style="dim")
    result.add_column(overflow="fold")
    for name, value in values.items():
        result.add_row(name, plain(value))
    return result


class Lines:
    """Lines of a block, without the blanks that fill them up to the width of the block.

    Args:
        block: What is shown.
        indent: Columns before every line.
        width: Of the lines; None is that of the console.
    """

    def __init__(self, block: RenderableType, indent: int = 0, width: int | None = None) -> None:
        self._block = block
        self._indent = indent
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield them."""
        width = self._width or options.max_width
        for line in console.render_lines(self._block, options.update_width(width - self._indent), pad=False):
            while line and not line[-1].text.strip(" "):
                line.pop()
            if line:
                last = line.pop()
                yield Segment(" " * self._indent)
                yield from line
                yield Segment(last.text.rstrip(" "), last.style)
            yield Segment.line()
