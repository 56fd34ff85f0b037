"""What is in a data directory, a row set or a row, as a person wants to see it; and the samples of a data card.

Everything is returned as text or plain values and nothing is printed. Text from the data is shown with its control
characters written out, because a terminal would obey them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.row_text import Boundary, Decoder, PackedRow, Part, View, around, beginning, visible
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.errors import DataError
from nemo_prolong.units import format_bytes, format_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAMPLE_CONTEXT_TOKENS = 32
_SAMPLE_BOUNDARIES = 6
_SAMPLE_MASKED_TOKENS = 512
_SUMMARY_ROWS = 2000
"""Rows that a summary reads at most, evenly spread: a published row set has tens of thousands."""
_LISTED_DOCUMENTS = 16
_STRIP_WIDTH = 72
_WHAT_TO_GIVE = "Give a directory that scripts/prepare_data.py wrote, one of its row sets, or another MDS directory."
_NEWLINE = "\u21b5"
_DOT = "\u00b7"


# ---- samples of a data card -----------------------------------------------------------------------------------------


def sample_row(row: dict[str, Any], number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return one row of a row set for ``samples.json``.

    Args:
        row: Columns of the row.
        number: Its number in the row set.
        tokenizer: Decodes its tokens.

    Returns:
        ``row``, ``domain``, ``tokens``, ``spans`` [[start, end], ...], ``boundaries`` and ``masked_text``. A boundary
        is ``{"position", "before", "after", "before_special", "after_special"}``: a little text on either side, and
        the character ranges of special tokens in it. The first boundaries are there, and the end of the row.
        ``masked_text`` is the beginning of a row with a mask as ``[{"text", "special", "target"}, ...]``, else None.

    Raises:
        DataError: If the row has no tokens.
    """
    packed = PackedRow.of(row, f"row {number}")
    decode = Decoder(tokenizer)
    boundaries = packed.boundaries
    if len(boundaries) > _SAMPLE_BOUNDARIES:
        boundaries = [*boundaries[: _SAMPLE_BOUNDARIES - 1], boundaries[-1]]
    return {
        "row": number,
        "domain": packed.domain,
        "tokens": len(packed.ids),
        "spans": packed.spans.tolist(),
        "boundaries": [_sample_boundary(packed, boundary, decode) for boundary in boundaries],
        "masked_text": None if packed.mask is None else _sample_masked_text(packed, decode),
    }


def _sample_boundary(packed: PackedRow, boundary: Boundary, decode: Decoder) -> dict[str, Any]:
    before, after = around(packed, boundary, _SAMPLE_CONTEXT_TOKENS, decode)
    return {
        "position": boundary[1],
        "before": "".join(part.text for part in before),
        "after": "".join(part.text for part in after),
        "before_special": _special_ranges(before),
        "after_special": _special_ranges(after),
    }


def _special_ranges(parts: Sequence[Part]) -> list[list[int]]:
    ends = np.cumsum([len(part.text) for part in parts], dtype=np.int64).tolist()
    return [[end - len(part.text), end] for part, end in zip(parts, ends, strict=True) if part.special]


def _sample_masked_text(packed: PackedRow, decode: Decoder) -> list[dict[str, Any]]:
    parts = beginning(packed, _SAMPLE_MASKED_TOKENS, decode)
    return [{"text": part.text, "special": part.special, "target": bool(part.target)} for part in parts]


# ---- text for a terminal --------------------------------------------------------------------------------------------


def show(directory: str | Path, rows: Sequence[str], view: View) -> Iterator[str]:
    """Yield blocks of text on a data directory, or on a row set and some of its rows.

    Args:
        directory: A data directory (with ``manifest.json``) or a row set (with ``index.json``).
        rows: Numbers of rows as they were typed.
        view: How to show them.

    Raises:
        DataError: If it is neither, a row is no number or not there, the tokenizer is unknown, or a shard is corrupt.
    """
    manifest = read_manifest(directory)
    if manifest is not None:
        if rows:
            raise DataError(
                f"{directory}: row {rows[0]}",
                "rows are in a row set, and this directory holds several.",
                f"Name one, such as {Path(directory, next(iter(manifest['row_sets']), 'ROW_SET'))}.",
            )
        yield _overview(directory, manifest, view)
        return
    reader = open_row_set(directory)
    numbers = [_row_number(text, reader) for text in rows]
    known = known_facts(directory)
    if not numbers:
        yield _summary(reader, known, view)
        return
    decode, note = _decoder(view, known)
    if note:
        yield view.soft(note)
    for number in numbers:
        packed = PackedRow.of(reader[number], f"{directory} row {number}")
        yield _row(packed, f"{directory} row {number:,} of {len(reader):,}", decode, view)


def read_manifest(directory: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a data directory, None where there is none.

    Raises:
        DataError: If it cannot be read.
    """
    path = Path(directory, "manifest.json")
    if is_remote(directory) or not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if not isinstance(manifest["row_sets"], dict):
            raise TypeError("row_sets is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}", f"is no manifest of a data directory ({error}).", "Prepare the data again."
        ) from error
    return dict(manifest)


def open_row_set(directory: str | Path) -> MdsReader:
    """Open one row set.

    Raises:
        DataError: If it is none, or damaged (``MdsReader``).
    """
    if not is_remote(directory) and not Path(directory).is_dir():
        raise DataError(f"{directory}", "is no directory.", _WHAT_TO_GIVE)
    try:
        return MdsReader(directory)
    except DataError as error:
        if is_remote(directory) or any(Path(directory).rglob("index.json")):
            raise
        rule = "is no data directory: it has neither a manifest.json nor an index.json."
        raise DataError(f"{directory}", rule, _WHAT_TO_GIVE) from error


def _row_number(text: str, reader: MdsReader) -> int:
    try:
        number = int(text)
    except ValueError:
        raise DataError(f"row {text!r}", "a row is named by its number.", f"Give 0 to {len(reader) - 1}.") from None
    if not 0 <= number < len(reader):
        last = f"Give 0 to {len(reader) - 1}." if len(reader) else "Prepare more text for it."
        raise DataError(f"row {number}", f"{reader.directory} has {len(reader)} rows, counted from 0.", last)
    return number


@dataclass(frozen=True)
class KnownFacts:
    """What the manifest above a row set says of it."""

    row_set: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None


def known_facts(directory: str | Path) -> KnownFacts:
    """Look for the data directory that a row set is in; a row set may lie deeper than one level."""
    if is_remote(directory):
        return KnownFacts()
    directory = Path(directory).resolve()
    for root in directory.parents[:3]:
        manifest = read_manifest(root)
        if manifest is not None:
            row_set = manifest["row_sets"].get(directory.relative_to(root).as_posix(), {})
            tokenizer = manifest.get("tokenizer")
            return KnownFacts(row_set, root / tokenizer if tokenizer else None)
    return KnownFacts()


def _decoder(view: View, known: KnownFacts) -> tuple[Decoder, str]:
    """Return the decoder and a note on what it cannot do.

    Raises:
        DataError: If the tokenizer that was asked for is none.
    """
    path = Path(view.tokenizer) if view.tokenizer else known.tokenizer
    if path is None:
        return Decoder(None), "No tokenizer is known for these rows, so ids are shown; name one with --tokenizer."
    if not view.tokenizer and not path.exists():
        return Decoder(None), f"The tokenizer {path} is gone, so ids are shown; name another with --tokenizer."
    return Decoder(load_tokenizer(path)), ""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load ``tokenizer.json``, given itself or its directory.

    Raises:
        DataError: If there is none.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Tokenizer.from_buffer(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        rule = f"is no tokenizer: {file.name} cannot be read ({reason})."
        raise DataError(f"tokenizer={path}", rule, "Give a directory that holds a tokenizer.json.") from error


def _overview(directory: str | Path, manifest: dict[str, Any], view: View) -> str:
    """Return the row sets of a data directory as a table."""
    row_sets = manifest["row_sets"]
    num_rows = sum(entry.get("rows", 0) for entry in row_sets.values())
    head = ["row set", "domain", "split", "packing", "seq_length", "rows", "documents", "tokens", "fill", "dropped"]
    rows = [[visible(str(path)), *_overview_cells(entry)] for path, entry in row_sets.items()]
    facts = [
        f"{count_words(num_rows, 'row')} in {count_words(len(row_sets), 'row set')}",
        f"tokenizer {manifest.get('tokenizer', '?')} of {manifest.get('vocab_size', 0):,} tokens",
        f"seed {manifest.get('seed', '?')}",
    ]
    where = Path(directory, next(iter(row_sets), "ROW_SET"))
    return "\n".join(
        [
            f"{view.bold(str(directory))}  {visible(f' {_DOT} '.join(facts))}",
            "",
            *_table(head, rows, 4, view),
            "",
            view.soft(f"A row: python scripts/inspect_data.py {where} 0"),
        ]
    )


def _overview_cells(entry: dict[str, Any]) -> list[str]:
    dropped = sum(entry.get("dropped_tokens", {}).values())
    total = entry.get("input_tokens") or 0
    return [
        visible(str(entry.get("domain", ""))),
        visible(str(entry.get("split", ""))),
        visible(str(entry.get("packing", ""))),
        format_tokens(entry.get("seq_length", 0)),
        f"{entry.get('rows', 0):,}",
        f"{entry.get('documents', 0):,}",
        f"{entry.get('tokens', 0):,}",
        _percent(entry["fill"]) if "fill" in entry else "",
        _percent(dropped / total) if total else "",
    ]


def count_words(number: int, what: str) -> str:
    """Return a number with its noun: ``1 row``, ``1,200 rows``."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int, view: View) -> list[str]:
    """Return lines of aligned columns, the first ``words`` of them to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sides = (
            f"{cell:<{width}}" if n < words else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(sides).rstrip()  # fmt: skip

    return [view.soft(line(head)), *map(line, rows)]


def _summary(reader: MdsReader, known: KnownFacts, view: View) -> str:
    """Return what a row set holds, from as many of its rows as are quick to read."""
    numbers = _quick_rows(reader)
    rows = [PackedRow.of(reader[int(number)], f"{reader.directory} row {number}") for number in numbers]
    facts = [
        ("rows", f"{len(reader):,}"),
        ("columns", ", ".join(f"{name} ({encoding})" for name, encoding in reader.columns.items())),
        ("shards", _shard_words(reader)),
        *(_row_facts(rows, len(reader), known.row_set) if rows else []),
    ]
    width = max(len(name) for name, _ in facts)
    problems = [
        view.warning(f"row {number}: {problem}.")
        for number, row in zip(numbers.tolist(), rows, strict=True)
        for problem in row.problems
    ]
    lines = [view.bold(str(reader.directory)), *(f"  {name:<{width}}  {visible(text)}" for name, text in facts)]
    hint = view.soft(f"A row: python scripts/inspect_data.py {reader.directory} 0")
    return "\n".join([*lines, *problems[:_LISTED_DOCUMENTS], "", hint])


def _quick_rows(reader: MdsReader) -> np.ndarray:
    """Return numbers of rows, int64: evenly spread, or those of one shard where each must be fetched or unpacked."""
    fetched = is_remote(reader.directory) or any(shard.packed for shard in reader.shards)
    reach = reader.shards[0].rows if fetched and reader.shards else len(reader)
    return np.unique(np.linspace(0, max(reach - 1, 0), min(reach, _SUMMARY_ROWS)).astype(np.int64))


def _shard_words(reader: MdsReader) -> str:
    stored = sum((shard.packed or shard.raw).num_bytes for shard in reader.shards)
    compressed = sorted({shard.compression for shard in reader.shards if shard.compression})
    return ", ".join([f"{len(reader.shards):,}", format_bytes(stored), *compressed])


def _row_facts(rows: Sequence[PackedRow], num_rows: int, row_set: dict[str, Any]) -> list[tuple[str, str]]:
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    documents = np.array([len(row.spans) for row in rows], np.int64)
    about = "" if len(rows) == num_rows else f" (about: from {count_words(len(rows), 'row')})"
    seq_length = row_set.get("seq_length") or int(lengths.max())
    spans = np.concatenate([row.spans[:, 1] - row.spans[:, 0] for row in rows])
    domains = sorted({row.domain for row in rows if row.domain})
    masked = [row for row in rows if row.mask is not None]
    facts = [
        ("domains", ", ".join(domains) or "none named"),
        ("tokens", f"{round(lengths.mean() * num_rows):,}{about}"),
        ("tokens per row", _range(lengths)),
        ("documents per row", _range(documents)),
        ("document length", _range(spans)),
        ("fill", f"{_percent(lengths.mean() / seq_length)} of {seq_length:,}{about}"),
    ]
    if masked:
        targets = sum(int(np.count_nonzero(row.mask)) for row in masked)
        facts.append(("targets", f"{_percent(targets / sum(len(row.ids) for row in masked))} of the tokens{about}"))
    return facts


def _range(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {values.mean():,.1f}"


def _row(packed: PackedRow, title: str, decode: Decoder, view: View) -> str:
    """Return a row: its documents as a strip and as a table, then its text."""
    facts = [
        count_words(len(packed.ids), "token"),
        count_words(len(packed.spans), "document"),
        visible(packed.domain or "no domain"),
    ]
    if packed.mask is not None:
        targets = int(np.count_nonzero(packed.mask))
        facts.append(
            f"{targets:,} targets ({_percent(targets / len(packed.ids))})" if len(packed.ids) else "no targets"
        )
    problems = [*packed.problems, *_unknown_ids(packed, decode)]
    lines = [
        f"{view.bold(title)}  {f' {_DOT} '.join(facts)}",
        *(view.warning(f"{problem}.") for problem in problems),
        f"  {_strip(packed)}",
        *_document_lines(packed, view),
        "",
    ]
    shown = _full_text if view.full else _boundary_text
    return "\n".join([*lines, *shown(packed, decode, view)])


def _unknown_ids(packed: PackedRow, decode: Decoder) -> list[str]:
    if decode.vocab_size is None:
        return []
    beyond = int(np.count_nonzero(packed.ids >= decode.vocab_size))
    largest = int(packed.ids.max(initial=0))
    words = f"{beyond:,} ids (up to {largest:,}) are beyond the {decode.vocab_size:,} tokens of the tokenizer"
    return [f"{words}: these rows were made with another one"] if beyond else []


def _strip(packed: PackedRow) -> str:
    """Return the row as a line of characters: one bar per document, in proportion."""
    total = max(len(packed.ids), 1)
    cells = ["-"] * _STRIP_WIDTH
    for start in packed.spans[:, 0].tolist():
        cells[min(start * _STRIP_WIDTH // total, _STRIP_WIDTH - 1)] = "|"
    return f"0 {''.join(cells)}| {len(packed.ids):,}"


def _document_lines(packed: PackedRow, view: View) -> list[str]:
    shown = packed.spans if view.full else packed.spans[:_LISTED_DOCUMENTS]
    head = ["document", "start", "end", "tokens", *(["targets"] if packed.mask is not None else [])]
    rows = []
    for number, (start, end) in enumerate(shown.tolist()):
        cells = [f"{number + 1}", f"{start:,}", f"{end:,}", f"{end - start:,}"]
        if packed.mask is not None:
            cells.append(f"{int(np.count_nonzero(packed.mask[start:end])):,}")
        rows.append(cells)
    left = len(packed.spans) - len(shown)
    more = [view.soft(f"  and {left:,} more; --full shows all")] if left else []
    return ["", *(f"  {line}" for line in _table(head, rows, 0, view)), *more]


def _boundary_text(packed: PackedRow, decode: Decoder, view: View) -> list[str]:
    """Return the text around the first boundaries and the row's end, and the beginning of a row with targets."""
    boundaries = packed.boundaries
    left = max(0, len(boundaries) - _LISTED_DOCUMENTS)
    lines = []
    for boundary in boundaries[: _LISTED_DOCUMENTS - 1] + boundaries[-1:] if left else boundaries:
        before, after = around(packed, boundary, view.context_tokens, decode)
        words = (view.text(before, _NEWLINE) or "(row begins)", view.text(after, _NEWLINE) or "(row ends)")
        lines += [view.soft(f"at {boundary[1]:,}"), f"  {words[0]}", f"  {words[1]}"]
    if packed.mask is not None:
        parts = beginning(packed, 10 * view.context_tokens, decode)
        lines += ["", view.soft("the row begins, targets marked"), view.text(parts, "\n")]
    return lines


def _full_text(packed: PackedRow, decode: Decoder, view: View) -> list[str]:
    lines = []
    for number, (start, end) in enumerate(packed.spans.tolist()):
        mask = None if packed.mask is None else packed.mask[start:end]
        lines.append(view.soft(f"document {number + 1}: tokens {start:,} to {end:,}"))
        lines.append(view.text(decode(packed.ids[start:end], mask), "\n"))
    return lines
