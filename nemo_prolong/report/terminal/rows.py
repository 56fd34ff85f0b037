"""Rows of a row set as a person wants to see them: their documents, and their text around the boundaries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from nemo_prolong.data.row_text import Decoder, Part, around, beginning, boundaries_of
from nemo_prolong.data.stored_row import StoredRow
from nemo_prolong.report import numbers
from nemo_prolong.report.terminal.layout import plain, table
from nemo_prolong.text import counted, escaped

LISTED = 16
"""Documents, boundaries and problems that are shown unless all are asked for."""

_STRIP_WIDTH = 72
_NEWLINE = "\u21b5"
_DOT = "\u00b7"
_SPECIAL, _TARGET = Style(color="cyan"), Style(color="black", bgcolor="green")


@dataclass(frozen=True)
class RowView:
    """How to show rows.

    Attributes:
        tokenizer: ``tokenizer.json`` or its directory; empty takes the one that the manifest names.
        context_tokens: Tokens shown on either side of a document boundary.
        full: Show all of a row's text and all of its documents.
        color: Mark targets with a colour; otherwise they stand in double brackets.
    """

    tokenizer: str = ""
    context_tokens: int = 24
    full: bool = False
    color: bool = False


def describe_row(row: StoredRow, title: str, decode: Decoder, view: RowView) -> RenderableType:
    """Return a row: its documents as a strip and as a table, then its text."""
    problems = [*problems_of(row), *_unknown_ids(row, decode), *_no_target(row)]
    show_text = _full_text if view.full else _boundary_text
    return Group(
        Text.assemble(plain(title, "bold"), f"  {joined(_row_facts(row))}"),
        *(warning(problem) for problem in problems),
        Text(f"  {_strip(row)}"),
        Text(),
        *_documents(row, view),
        Text(),
        *show_text(row, decode, view),
    )


def problems_of(row: StoredRow) -> list[str]:
    """Return what training would refuse of a row, without the full stop."""
    return [f"the row {fault.rule.rstrip('.')}" for fault in row.faults]


def joined(facts: Sequence[str]) -> str:
    """Return facts on one line."""
    return escaped(f" {_DOT} ".join(facts))


def warning(problem: str) -> Text:
    """Return a problem as a sentence that stands out."""
    return plain(f"{problem}.", "bold red")


def _row_facts(row: StoredRow) -> list[str]:
    facts = [counted(len(row.ids), "token"), counted(len(row.spans), "document"), row.domain or "no domain"]
    if row.mask is not None:
        targets = row.target_tokens
        share = numbers.percent(targets / max(len(row.ids), 1), 2)
        facts.append(f"{targets:,} targets ({share})" if len(row.ids) else "no targets")
    return facts


def _no_target(row: StoredRow) -> list[str]:
    masked = row.mask is not None and not row.target_tokens
    return ["no token is a target: with data.apply_instruct_masks nothing is learned from this row"] if masked else []


def _unknown_ids(row: StoredRow, decode: Decoder) -> list[str]:
    if decode.vocab_size is None:
        return []
    beyond = int(np.count_nonzero(row.ids >= decode.vocab_size))
    largest = int(row.ids.max(initial=0))
    words = f"{beyond:,} ids (up to {largest:,}) are beyond the {decode.vocab_size:,} tokens of the tokenizer"
    return [f"{words}: these rows were made with another one"] if beyond else []


def _strip(row: StoredRow) -> str:
    """Return the row as a line of characters: one bar per document, in proportion."""
    total = max(len(row.ids), 1)
    cells = ["-"] * _STRIP_WIDTH
    for start in row.spans[:, 0].tolist():
        cells[min(start * _STRIP_WIDTH // total, _STRIP_WIDTH - 1)] = "|"
    return f"0 {''.join(cells)}| {len(row.ids):,}"


def _documents(row: StoredRow, view: RowView) -> Iterator[RenderableType]:
    shown = row.spans if view.full else row.spans[:LISTED]
    lines = []
    for number, (start, end) in enumerate(shown.tolist()):
        cells = [f"{number + 1}", f"{start:,}", f"{end:,}", f"{end - start:,}"]
        if row.mask is not None:
            # The first token of a document has no loss, because nothing before it predicts it.
            cells.append(f"{int(np.count_nonzero(row.mask[start + 1 : end])):,}")
        lines.append(cells)
    head = ["document", "start", "end", "tokens", *(["targets"] if row.mask is not None else [])]
    yield table(head, lines, indent=2)
    if left := len(row.spans) - len(shown):
        yield Text(f"  and {left:,} more; --full shows all", "dim")


def _boundary_text(row: StoredRow, decode: Decoder, view: RowView) -> Iterator[RenderableType]:
    """Yield the text around the first boundaries and the row's end, and the beginning of a row with targets."""
    boundaries = boundaries_of(row)
    left = max(0, len(boundaries) - LISTED)
    for boundary in boundaries[: LISTED - 1] + boundaries[-1:] if left else boundaries:
        before, after = around(row, boundary, view.context_tokens, decode)
        yield Text(f"at {boundary[1]:,}", "dim")
        yield Passage(before, view.color, "  ", _NEWLINE) if before else Text("  (row begins)")
        yield Passage(after, view.color, "  ", _NEWLINE) if after else Text("  (row ends)")
    if row.mask is not None:
        yield Text()
        yield Text("the row begins, targets marked", "dim")
        yield Passage(beginning(row, 10 * view.context_tokens, decode), view.color)


def _full_text(row: StoredRow, decode: Decoder, view: RowView) -> Iterator[RenderableType]:
    for number, (start, end) in enumerate(row.spans.tolist()):
        mask = None if row.mask is None else row.mask[start:end]
        yield Text(f"document {number + 1}: tokens {start:,} to {end:,}", "dim")
        yield Passage(decode(row.ids[start:end], mask), view.color)


class Passage:
    """Decoded text with special tokens and targets marked, and control characters written out.

    It is made of segments and not of ``rich.text.Text``, which would turn tabs into blanks.

    Args:
        parts: What it says.
        color: Mark with colours; otherwise targets stand in double brackets.
        indent: What stands before it.
        newline: How line ends are written.
    """

    def __init__(self, parts: Sequence[Part], color: bool, indent: str = "", newline: str = "\n") -> None:
        self._pieces = _colored(parts) if color else _bracketed(parts)
        self._indent = indent
        self._newline = newline

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield every line by itself, because a pager starts every line without colour."""
        if self._indent:
            yield Segment(self._indent)
        for text, style in self._pieces:
            first, *others = text.replace("\n", self._newline).split("\n")
            yield Segment(first, style)
            for line in others:
                yield Segment.line()
                yield Segment(line, style)
        yield Segment.line()


def _colored(parts: Sequence[Part]) -> list[tuple[str, Style]]:
    plain_style = Style.null()
    return [
        (escaped(part.text), (_SPECIAL if part.special else plain_style) + (_TARGET if part.target else plain_style))
        for part in parts
    ]


def _bracketed(parts: Sequence[Part]) -> list[tuple[str, Style]]:
    runs = itertools.groupby(parts, key=lambda part: bool(part.target))
    texts = [(target, escaped("".join(part.text for part in run))) for target, run in runs]
    return [(f"[[{text}]]" if target else text, Style.null()) for target, text in texts]
