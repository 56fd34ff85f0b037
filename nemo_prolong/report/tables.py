"""A table of text, which a page shows as HTML and a card as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A value.

    Attributes:
        text: As it is shown.
        beyond: Whether it lies beyond what the model was trained on.
        repeats: Whether it repeats the cell above it.
    """

    text: str
    beyond: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row; all other columns are aligned right unless ``words``.

    Attributes:
        head: Column titles.
        rows: As many cells as ``head``.
        words: Columns (by index) that hold words.
    """

    head: list[str]
    rows: list[list[Cell]]
    words: frozenset[int] = frozenset({0})


def text_cells(*texts: Any) -> list[Cell]:
    """Return plain cells."""
    return [Cell(str(value)) for value in texts]
