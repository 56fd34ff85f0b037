"""Text for people: counts, Markdown tables, and text whose control characters are made visible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Marks that turn the direction of writing."""

_CONTROLS = (*(code for code in range(32) if chr(code) not in "\t\n"), *range(127, 160))
"""Control characters but tab and newline."""

_SURROGATES = range(0xD800, 0xE000)

_PICTURES = {
    **dict.fromkeys((*_CONTROLS, *_DIRECTIONS, *_SURROGATES), 0xFFFD),
    **{code: 0x2400 + code for code in _CONTROLS if code < 32},
    127: 0x2421,
}

_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in (*_CONTROLS, *_DIRECTIONS)}

_MARKUP = re.compile(r"[\\`*\[\]<>|~&#$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
"""What Markdown may take for markup or a link; an underscore inside a word is none."""


def pictured(text: str) -> str:
    r"""Return ``text`` with every hidden character as one visible character, so that positions in it stay right.

    >>> pictured("a\x1bb")
    'a\u241bb'
    """
    return text.translate(_PICTURES)


def escaped(text: str) -> str:
    r"""Return ``text`` with every character written out that would control a terminal.

    >>> print(escaped("a\x1bb"))
    a\x1bb
    """
    return text.translate(_ESCAPES)


def one_line(text: object) -> str:
    r"""Return ``text`` on one line, with every hidden character as a visible one.

    >>> one_line("a\n\n b\x1b")
    'a b\u241b'
    """
    return pictured(" ".join(str(text).split()))


def markdown_text(text: object) -> str:
    r"""Return ``text`` as one line that Markdown shows as it is, in a sentence, a heading or a cell of a table.

    >>> print(markdown_text("docs_2048 | *new*"))
    docs_2048 \| \*new\*
    """
    return _MARKUP.sub(lambda match: f"\\{match[0]}", one_line(text))


def markdown_code(text: object) -> str:
    """Return ``text`` as a code span on one line, whatever backticks are in it; not for a cell of a table.

    >>> markdown_code("runs/sft"), markdown_code("a`b")
    ('`runs/sft`', '`` a`b ``')
    """
    line = one_line(text)
    if "`" not in line:
        return f"`{line}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", line))))
    return f"{fence} {line} {fence}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """Return a Markdown table; what stands in a cell must not hold a bar or a line end.

    Args:
        head: Headings.
        rows: Cells, as many as headings.
        right: Columns that are aligned to the right.

    >>> print(markdown_table(["stage", "steps"], [["sft", 40]], right=[1]))
    | stage | steps |
    |:---|---:|
    | sft | 40 |
    """
    right = set(right)
    rule = "|".join("---:" if column in right else ":---" for column in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)
