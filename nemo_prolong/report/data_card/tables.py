"""The tables of a data card, the same for the page and for Markdown, and what its reader is warned of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nemo_prolong.data.epochs import MAX_EPOCHS
from nemo_prolong.records.data_manifest import DataManifest, LengthHistogram, RowSetFacts, StageFacts, losses
from nemo_prolong.report import numbers
from nemo_prolong.report.tables import Cell, Table
from nemo_prolong.units import format_bytes, format_tokens

MAX_FILES = 20
"""Files of a source that a card lists; the manifest lists all."""
MAX_COLUMNS = 20
"""Columns of a source that were not read and that a card lists; the manifest lists more."""

REASONS = {
    "short_document": "shorter than a piece",
    "remainder": "what is left of a cut document",
    "truncated": "cut off by the end of a row",
    "last_row": "incomplete last row",
    "underfilled_row": "in the one row that is too empty to keep",
    "no_target": "without a target",
    "max_rows": "beyond max_rows",
}
"""Why tokens are in no row, in words."""


def documents_table(manifest: DataManifest) -> Table:
    """Return documents and tokens of every domain and split."""
    rows = []
    seen: set[str] = set()
    for domain, split, facts in manifest.splits:
        name = Cell(domain, repeats=domain in seen)
        seen.add(domain)
        buckets = facts.length_histogram.buckets
        longest = bucket_words(buckets[-1]) if buckets else numbers.MISSING
        mean = numbers.count(facts.tokens / facts.documents) if facts.documents else numbers.MISSING
        share = half_of_tokens(facts.length_histogram)
        cells = (split, numbers.count(facts.documents), numbers.tokens(facts.tokens), mean, share, longest)
        rows.append([name, *_cells(*cells)])
    head = ["Domain", "Split", "Documents", "Tokens", "Mean tokens", "Half of the tokens from", "Longest"]
    return Table(head, rows, frozenset({0, 1}))


def half_of_tokens(histogram: LengthHistogram) -> str:
    """Return the length from which on documents hold at least half of the tokens, as the edge of a bucket."""
    total, above = sum(histogram.tokens), 0
    for bucket in reversed(range(len(histogram.tokens))):
        above += histogram.tokens[bucket]
        if total and 2 * above >= total:
            return format_tokens(2**bucket)
    return numbers.MISSING


def bucket_words(bucket: int) -> str:
    """Return the lengths of a bucket, e.g. ``1K-2K`` with an en dash."""
    return f"{format_tokens(2**bucket)}\u2013{format_tokens(2 ** (bucket + 1))}"


def taken_tokens(manifest: DataManifest, stage: StageFacts, path: str) -> int:
    """Return the real tokens that a stage takes of a row set, repetitions counted."""
    return round(stage.row_sets[path].rows_taken * manifest.row_sets[path].tokens_per_row)


def stage_table(manifest: DataManifest, stage: StageFacts) -> Table:
    """Return a stage's mixture: what it wants of every row set, what is there and how often it is repeated."""
    taken = {path: taken_tokens(manifest, stage, path) for path in stage.row_sets}
    total = sum(taken.values()) or 1
    rows = []
    for path, entry in stage.row_sets.items():
        row_set = manifest.row_sets[path]
        cells = _cells(
            path,
            row_set.domain,
            numbers.percent(entry.proportion),
            numbers.percent(taken[path] / total),
            numbers.tokens(taken[path]),
            numbers.tokens(row_set.tokens),
            f"{entry.rows_taken:,} of {row_set.rows:,}",
        )
        rows.append([*cells, Cell(f"{entry.epochs:.2f}", beyond=entry.epochs > MAX_EPOCHS)])
    head = ["Row set", "Domain", "Wanted", "Given", "Tokens taken", "Tokens there", "Rows taken", "Epochs"]
    return Table(head, rows, frozenset({0, 1}))


def domain_table(manifest: DataManifest) -> Table | None:
    """Return the share of every domain in every stage; None without stages."""
    if not manifest.stages:
        return None
    shares: dict[str, dict[str, float]] = {}
    for name, stage in manifest.stages.items():
        for path, entry in stage.row_sets.items():
            of_stage = shares.setdefault(manifest.row_sets[path].domain, {})
            of_stage[name] = of_stage.get(name, 0.0) + entry.proportion
    rows = [
        _cells(domain, *(numbers.percent(given.get(name)) for name in manifest.stages))
        for domain, given in shares.items()
    ]
    return Table(["Domain", *manifest.stages], rows)


def warnings(manifest: DataManifest) -> list[str]:
    """Return what a reader is warned of, each in a sentence or two."""
    return [*repetition_warnings(manifest), *unread_warnings(manifest), *loss_warnings(manifest)]


def unread_warnings(manifest: DataManifest) -> list[str]:
    """Return a warning for every source with columns that change what is learned and were not read."""
    return [
        f"The source {source.path or source.format} of {source.domain} has columns that were not read, and their names "
        f"say that they change what is learned: {listed(source.columns_to_check)}. If that is meant, name them in its "
        "ignore_fields."
        for source in manifest.sources
        if source.columns_to_check
    ]


def repetition_warnings(manifest: DataManifest) -> list[str]:
    """Return a sentence for every row set that a stage repeats more often than the recipe repeats any."""
    return [
        f"{name} walks {entry.epochs:.2f} times through {path}, more than the {MAX_EPOCHS} times that ProLong's own "
        "pretraining repeats its most repeated domain. Give it more text, a smaller proportion, or the stage fewer "
        "tokens."
        for name, stage in manifest.stages.items()
        for path, entry in stage.row_sets.items()
        if entry.epochs > MAX_EPOCHS
    ]


def loss_warnings(manifest: DataManifest) -> list[str]:
    """Return a sentence for everything that packing lost and someone should look at."""
    return [f"{path}: {loss}" for path, entry in manifest.row_sets.items() for loss in losses(entry)]


def targets_table(manifest: DataManifest) -> Table | None:
    """Return the tokens with a loss of every row set that has masks; None where none has or they were not counted."""
    rows = [
        _cells(
            path,
            numbers.count(entry.input_target_tokens),
            numbers.count(entry.target_tokens),
            numbers.percent(entry.target_share),
            numbers.count(entry.documents_without_target),
            numbers.count(entry.cut_documents),
            numbers.count(entry.cut_target_tokens),
        )
        for path, entry in manifest.row_sets.items()
        if entry.target_tokens is not None
    ]
    head = [
        "Row set",
        "Targets in",
        "Targets in rows",
        "Of the tokens in rows",
        "Left out without a target",
        "Documents cut",
        "Targets cut off",
    ]
    return Table(head, rows) if rows else None


def row_sets_table(manifest: DataManifest) -> Table:
    """Return every row set and how well its rows are filled."""
    rows = [
        _cells(
            path,
            entry.domain,
            entry.split,
            packing_words(entry),
            format_tokens(entry.seq_length),
            numbers.count(entry.rows),
            numbers.count(entry.documents),
            numbers.tokens(entry.tokens),
            fill_words(entry.fill),
        )
        for path, entry in manifest.row_sets.items()
    ]
    head = ["Row set", "Domain", "Split", "Packing", "seq_length", "Rows", "Pieces", "Tokens", "Fill"]
    return Table(head, rows, frozenset({0, 1, 2, 3}))


def packing_words(entry: RowSetFacts) -> str:
    """Return how a row set is packed, e.g. ``split at 64K``."""
    return entry.packing + (f" at {format_tokens(entry.document_length)}" if entry.document_length else "")


def fill_words(fill: float) -> str:
    """Return a share with as many digits as tell it from 100%."""
    return numbers.percent(fill) if fill == 1 or fill < 0.999 else f"{100 * fill:.3f}%"


def drop_reasons(manifest: DataManifest) -> list[str]:
    """Return every reason for which a token or a document was dropped, the known ones first."""
    given = {
        reason
        for entry in manifest.row_sets.values()
        for counts in (entry.dropped_tokens, entry.dropped_documents)
        for reason, count in counts.items()
        if count
    }
    return [*(reason for reason in REASONS if reason in given), *sorted(given - REASONS.keys())]


def drops_table(manifest: DataManifest) -> Table:
    """Return what went into every row set and what is in no row, by reason."""
    reasons = drop_reasons(manifest)
    rows = []
    for path, entry in manifest.row_sets.items():
        dropped = sum(entry.dropped_documents.values())
        rows.append(
            _cells(
                path,
                numbers.count(entry.input_documents),
                numbers.count(entry.input_tokens),
                numbers.count(entry.tokens),
                *(numbers.count(entry.dropped_tokens.get(reason, 0)) for reason in reasons),
                numbers.count(dropped),
            )
        )
    head = [
        "Row set",
        "Documents in",
        "Tokens in",
        "In rows",
        *(reason_words(r) for r in reasons),
        "Documents left out",
    ]
    return Table(head, rows)


def reason_words(reason: str) -> str:
    """Return a reason for a reader; one that is not known is shown as it is."""
    return REASONS.get(reason, reason.replace("_", " "))


def attention_table(manifest: DataManifest) -> Table:
    """Return what document attention costs in every row set."""
    rows = [
        _cells(
            path,
            format_tokens(entry.seq_length),
            f"{entry.documents / entry.rows:,.1f}",
            numbers.count(entry.sum_squared_lengths / entry.tokens),
            f"{entry.sum_squared_lengths:.3e}",
            numbers.percent(entry.attention_share),
        )
        for path, entry in manifest.row_sets.items()
    ]
    head = ["Row set", "seq_length", "Documents per row", "Mean document of a token", "Sum of squares", "Of a full row"]
    return Table(head, rows)


def pieces_table(manifest: DataManifest) -> Table | None:
    """Return how the tokens of every row set lie in pieces by length; None without histograms."""
    histograms = {path: entry.length_histogram for path, entry in manifest.row_sets.items()}
    buckets = sorted({bucket for histogram in histograms.values() for bucket in histogram.buckets})
    if not buckets:
        return None
    rows = []
    for path, histogram in histograms.items():
        total = sum(histogram.tokens) or 1
        shares = [histogram.tokens[bucket] / total if bucket < len(histogram.tokens) else 0.0 for bucket in buckets]
        rows.append(_cells(path, *(numbers.percent(share) if share else numbers.MISSING for share in shares)))
    return Table(["Row set", *map(bucket_words, buckets)], rows)


def sources_table(manifest: DataManifest) -> Table:
    """Return what every source gave."""
    rows = [
        _cells(
            source.path or source.format,
            source.domain,
            source.format,
            source.split,
            numbers.count(len(source.files)),
            format_bytes(source.input_bytes),
            numbers.count(source.documents),
            numbers.tokens(source.tokens),
            numbers.significant(source.input_bytes / source.tokens if source.tokens else None),
            numbers.count(sum(rejection.documents for rejection in source.rejected.values())),
        )
        for source in manifest.sources
    ]
    head = [
        "Source",
        "Domain",
        "Format",
        "Split",
        "Files",
        "Input",
        "Documents",
        "Tokens",
        "Bytes per token",
        "Rejected",
    ]
    return Table(head, rows, frozenset({0, 1, 2, 3}))


def rejected_table(manifest: DataManifest) -> Table | None:
    """Return how many documents were rejected, by source and reason; None where none was."""
    rows = [
        _cells(source.path, source.domain, reason, numbers.count(count.documents), format_bytes(count.bytes))
        for source in manifest.sources
        for reason, count in source.rejected.items()
        if count.documents
    ]
    return Table(["Source", "Domain", "Reason", "Documents", "Size"], rows, frozenset({0, 1, 2})) if rows else None


def examples_table(manifest: DataManifest) -> Table | None:
    """Return documents that were rejected; None where none is named."""
    rows = [
        _cells(example.key, example.reason, example.detail, format_bytes(example.bytes))
        for source in manifest.sources
        for example in source.rejected_examples
    ]
    return Table(["Document", "Reason", "What was wrong", "Size"], rows, frozenset({0, 1, 2})) if rows else None


def unread_table(manifest: DataManifest) -> Table | None:
    """Return the columns of sources that were not read, and the keys that messages lost; None where there are none."""
    rows: list[list[Cell]] = []
    for source in manifest.sources:
        for kind, counts in (("column", source.unread_columns), ("key of messages", source.dropped_keys)):
            shown = list(counts.items())[:MAX_COLUMNS]
            name = source.path or source.format
            rows += [_cells(name, source.domain, kind, column, numbers.count(count)) for column, count in shown]
            if len(counts) > len(shown):
                rows.append(_cells(name, source.domain, kind, f"and {len(counts) - len(shown):,} more", ""))
    head = ["Source", "Domain", "What", "Name", "Records or messages"]
    return Table(head, rows, frozenset({0, 1, 2, 3})) if rows else None


def files_table(manifest: DataManifest) -> Table | None:
    """Return the first files of every source with their hashes; None where sources have no files."""
    rows: list[list[Cell]] = []
    for source in manifest.sources:
        for file in source.files[:MAX_FILES]:
            rows.append(_cells(file.name, source.domain, format_bytes(file.bytes), file.sha256))
        if len(source.files) > MAX_FILES:
            rows.append(_cells(f"and {len(source.files) - MAX_FILES:,} more", source.domain, "", "in manifest.json"))
    return Table(["File", "Domain", "Size", "SHA-256"], rows, frozenset({0, 1, 3})) if rows else None


def hashes_table(manifest: DataManifest) -> Table:
    """Return the hash of every row set."""
    rows = [_cells(path, entry.sha256) for path, entry in manifest.row_sets.items()]
    return Table(["Row set", "SHA-256 of its index and shards"], rows, frozenset({0, 1}))


def tokenizer_table(manifest: DataManifest) -> Table:
    """Return what the tokens were made with."""
    inputs = [(source.input_bytes, source.tokens) for source in manifest.sources]
    tokens = sum(count for _, count in inputs)
    per_token = sum(size for size, _ in inputs) / tokens if tokens else None
    facts = [
        ("directory", manifest.tokenizer),
        ("SHA-256", manifest.tokenizer_sha256),
        ("library", manifest.tokenizer_library),
        ("vocabulary", numbers.count(manifest.vocab_size)),
        ("begins a document", manifest.bos_token or "nothing"),
        ("ends a document", manifest.eos_token or "nothing"),
        ("bytes of input per token", numbers.significant(per_token)),
    ]
    return Table(["Tokenizer", ""], [_cells(*fact) for fact in facts], frozenset({0, 1}))


def software_table(manifest: DataManifest) -> Table:
    """Return the software that the bytes depend on."""
    versions = {"python": manifest.python, **manifest.versions} if manifest.python else manifest.versions
    return Table(["Software", "Version"], [_cells(*item) for item in versions.items()])


def lengths_words(manifest: DataManifest) -> str:
    """Return the row lengths of the directory: ``2K``, or ``512 to 8K``."""
    lengths = [entry.seq_length for entry in manifest.row_sets.values()]
    low, high = min(lengths), max(lengths)
    return format_tokens(low) if low == high else f"{format_tokens(low)} to {format_tokens(high)}"


def listed(names: Iterable[str], at_most: int = 6) -> str:
    """Return names as a sentence lists them; of many, the first and how many more."""
    every: Sequence[str] = list(names)
    if len(every) > at_most:
        return f"{', '.join(every[: at_most - 1])} and {len(every) - at_most + 1} more"
    return " and ".join([", ".join(every[:-1]), every[-1]]) if len(every) > 1 else "".join(every)


def _cells(*texts: Any) -> list[Cell]:
    return [Cell(str(text)) for text in texts]
