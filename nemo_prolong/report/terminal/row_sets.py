"""What is in a data directory or a row set, as a person wants to see it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from nemo_prolong.config.commands import shell_command
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.row_origins import row_origins
from nemo_prolong.data.row_sets import KnownFacts, known_facts, open_row_set, read_manifest
from nemo_prolong.data.row_text import Decoder, load_tokenizer
from nemo_prolong.data.storage.stores import is_remote
from nemo_prolong.data.stored_row import StoredRow
from nemo_prolong.errors import DataError
from nemo_prolong.report import numbers
from nemo_prolong.report.terminal.layout import Lines, facts, plain, table
from nemo_prolong.report.terminal.rows import LISTED, RowView, describe_row, joined, problems_of, warning
from nemo_prolong.text import counted
from nemo_prolong.units import format_bytes, format_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SUMMARY_ROWS = 2000
"""Rows that a summary reads at most, evenly spread: a published row set has tens of thousands."""


def describe(directory: str | Path, rows: Sequence[str], view: RowView) -> Iterator[RenderableType]:
    """Yield what there is to see of a data directory, or of a row set and some of its rows.

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
        yield _overview(directory, manifest)
        return
    reader = open_row_set(directory)
    chosen = [_row_number(text, reader) for text in rows]
    known = known_facts(directory)
    if not chosen:
        yield _summary(reader, known)
        return
    decode, note = _decoder(reader, view, known)
    if note:
        yield plain(note, "dim")
    for number in chosen:
        row = _row(reader, number)
        yield describe_row(row, f"{directory} row {number:,} of {len(reader):,}", decode, view)


def _row(reader: MdsReader, number: int) -> StoredRow:
    """Return a row, whatever is wrong with it, as long as it has tokens."""
    row = StoredRow.of(reader[number])
    return row if len(row.ids) else row.checked(f"{reader.directory} row {number}")


def _row_number(text: str, reader: MdsReader) -> int:
    try:
        number = int(text)
    except ValueError:
        raise DataError(f"row {text!r}", "a row is named by its number.", f"Give 0 to {len(reader) - 1}.") from None
    if not 0 <= number < len(reader):
        last = f"Give 0 to {len(reader) - 1}." if len(reader) else "Prepare more text for it."
        raise DataError(f"row {number}", f"{reader.directory} has {len(reader)} rows, counted from 0.", last)
    return number


def _decoder(reader: MdsReader, view: RowView, known: KnownFacts) -> tuple[Decoder, str]:
    """Return the decoder and a note on what it cannot do.

    Raises:
        DataError: If the tokenizer that was asked for is none.
    """
    path = Path(view.tokenizer) if view.tokenizer else known.tokenizer
    if path is None:
        return Decoder(None), "No tokenizer is known for these rows, so ids are shown; name one with --tokenizer."
    if not view.tokenizer and not path.exists():
        return Decoder(None), f"The tokenizer {path} is gone, so ids are shown; name another with --tokenizer."
    tokenizer = load_tokenizer(path)
    return Decoder(tokenizer), _foreign(reader, tokenizer, path)


def _foreign(reader: MdsReader, tokenizer: Tokenizer, path: Path) -> str:
    """Return a note where the rows were made with another tokenizer than they are shown with."""
    # The package of this module imports what only encoding needs.
    from nemo_prolong.data.tokenizer.identity import definition_sha256

    sha256 = definition_sha256(json.loads(tokenizer.to_str()))
    for where, origin in row_origins(reader.directory).items():
        if origin.tokenizer_sha256 != sha256:
            return f"These rows were made with {origin.name}, as {where} says. {path} is another tokenizer."
    return ""


def _hint(row_set: str | Path) -> Text:
    return plain(f"A row: {shell_command(['python', 'scripts/inspect_data.py', str(row_set), '0'])}", "dim")


def _overview(directory: str | Path, manifest: dict[str, Any]) -> RenderableType:
    """Return the row sets of a data directory as a table."""
    row_sets = manifest["row_sets"]
    num_rows = sum(entry.get("rows", 0) for entry in row_sets.values())
    words = [
        f"{counted(num_rows, 'row')} in {counted(len(row_sets), 'row set')}",
        f"tokenizer {manifest.get('tokenizer', '?')} of {manifest.get('vocab_size', 0):,} tokens",
        f"seed {manifest.get('seed', '?')}",
    ]
    head = ["row set", "domain", "split", "packing", "seq_length", "rows", "documents", "tokens", "fill", "dropped"]
    rows = [[str(path), *_overview_cells(entry)] for path, entry in row_sets.items()]
    shares = [_target_share(entry) for entry in row_sets.values()]
    if any(shares):
        head.append("targets")
        rows = [[*row, share] for row, share in zip(rows, shares, strict=True)]
    return Group(
        Text.assemble(plain(str(directory), "bold"), f"  {joined(words)}"),
        Text(),
        table(head, rows, words=4),
        Text(),
        _hint(Path(directory, next(iter(row_sets), "ROW_SET"))),
    )


def _overview_cells(entry: dict[str, Any]) -> list[str]:
    dropped = sum(entry.get("dropped_tokens", {}).values())
    total = entry.get("input_tokens") or 0
    return [
        str(entry.get("domain", "")),
        str(entry.get("split", "")),
        str(entry.get("packing", "")),
        format_tokens(entry.get("seq_length", 0)),
        f"{entry.get('rows', 0):,}",
        f"{entry.get('documents', 0):,}",
        f"{entry.get('tokens', 0):,}",
        numbers.percent(entry["fill"], 2) if "fill" in entry else "",
        numbers.percent(dropped / total, 2) if total else "",
    ]


def _target_share(entry: dict[str, Any]) -> str:
    """Return the share of a row set's tokens that have a loss, empty where they are not marked or not counted."""
    targets, tokens = entry.get("target_tokens"), entry.get("tokens")
    return numbers.percent(targets / tokens, 2) if targets is not None and tokens else ""


def _summary(reader: MdsReader, known: KnownFacts) -> RenderableType:
    """Return what a row set holds, from as many of its rows as are quick to read."""
    chosen = _quick_rows(reader)
    rows = [_row(reader, number) for number in chosen]
    values = {
        "rows": f"{len(reader):,}",
        "columns": ", ".join(f"{name} ({encoding})" for name, encoding in reader.columns.items()),
        "shards": _shard_words(reader),
        **(_row_facts(rows, len(reader), known.row_set) if rows else {}),
    }
    problems = [
        f"row {number}: {problem}" for number, row in zip(chosen, rows, strict=True) for problem in problems_of(row)
    ]
    return Group(
        plain(str(reader.directory), "bold"),
        Lines(facts(values), indent=2),
        *map(warning, problems[:LISTED]),
        Text(),
        _hint(reader.directory),
    )


def _quick_rows(reader: MdsReader) -> list[int]:
    """Return numbers of rows: evenly spread, or those of one shard where each must be fetched or unpacked."""
    fetched = is_remote(reader.directory) or any(shard.packed for shard in reader.shards)
    reach = reader.shards[0].rows if fetched and reader.shards else len(reader)
    spread = np.linspace(0, max(reach - 1, 0), min(reach, _SUMMARY_ROWS)).astype(np.int64)
    return [int(number) for number in np.unique(spread)]


def _shard_words(reader: MdsReader) -> str:
    stored = sum((shard.packed or shard.raw).num_bytes for shard in reader.shards)
    compressed = sorted({shard.compression for shard in reader.shards if shard.compression})
    return ", ".join([f"{len(reader.shards):,}", format_bytes(stored), *compressed])


def _row_facts(rows: Sequence[StoredRow], num_rows: int, row_set: dict[str, Any]) -> dict[str, str]:
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    documents = np.array([len(row.spans) for row in rows], np.int64)
    about = "" if len(rows) == num_rows else f" (about: from {counted(len(rows), 'row')})"
    seq_length = row_set.get("seq_length") or int(lengths.max())
    spans = np.concatenate([row.spans[:, 1] - row.spans[:, 0] for row in rows])
    values = {
        "domains": ", ".join(sorted({row.domain for row in rows if row.domain})) or "none named",
        "tokens": f"{round(lengths.mean() * num_rows):,}{about}",
        "tokens per row": _range(lengths),
        "documents per row": _range(documents),
        "document length": _range(spans),
        "fill": f"{numbers.percent(lengths.mean() / seq_length, 2)} of {seq_length:,}{about}",
    }
    if any(row.mask is not None for row in rows):
        targets = sum(row.target_tokens for row in rows) / lengths.sum()
        values["targets"] = f"{numbers.percent(targets, 2)} of the tokens{about}"
        without = sum(row.target_tokens == 0 for row in rows)
        values["rows of no target"] = f"{without:,}{about}"
        values |= _packing_losses(row_set)
    return values


def _packing_losses(row_set: dict[str, Any]) -> dict[str, str]:
    """Return what packing lost of the targets; empty where the manifest does not say."""
    if row_set.get("cut_documents") is None:
        return {}
    left_out = row_set.get("dropped_documents", {}).get("no_target", 0)
    cut, tokens = row_set["cut_documents"], row_set.get("cut_target_tokens") or 0
    return {
        "left out": f"{counted(left_out, 'document')} without a target",
        "cut": f"{counted(cut, 'document')}, which lost {counted(tokens, 'target token')}",
    }


def _range(values: NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, mean {values.mean():,.1f}"
