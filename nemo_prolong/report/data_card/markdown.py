"""The data card as GitHub Markdown: the same facts as the page in tables, no pictures.

Text from the data is escaped, so that a document can neither format, nor link, nor break a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from nemo_prolong.records.data_manifest import DataManifest, Samples
from nemo_prolong.report.data_card import tables
from nemo_prolong.report.data_card.page import headline_tiles, sample_facts, subtitle, title
from nemo_prolong.report.tables import Table
from nemo_prolong.text import markdown_table

_SPECIAL = re.compile(r"[\\`*\[\]<>|~&#$@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")
_LINE_END = "\u21b5"


def escape(text: str) -> str:
    """Return ``text`` as one line that Markdown shows as it is."""
    line = _LINE_END.join(text.splitlines()).replace("\t", " ") if text else ""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", line)


def render(manifest: DataManifest, samples: Samples, manifest_sha256: str) -> str:
    """Return the whole card."""
    blocks = [f"# {escape(title(manifest))}", escape(subtitle(manifest))]
    tiles = headline_tiles(manifest)
    blocks.append("\n".join(f"- **{escape(tile.value)}** {tile.title} ({escape(tile.detail)})" for tile in tiles))
    blocks += [f"> **Warning:** {escape(warning)}" for warning in tables.warnings(manifest)]
    blocks += ["## Documents", _table(tables.documents_table(manifest))]
    blocks += _mixture(manifest)
    blocks += ["## Rows", _table(tables.row_sets_table(manifest))]
    blocks += _optional("### Targets of the loss", tables.targets_table(manifest))
    blocks += ["### Tokens dropped, by reason", _table(tables.drops_table(manifest))]
    blocks += ["### Attention cost", _table(tables.attention_table(manifest))]
    blocks += _optional("### Tokens by length of their piece", tables.pieces_table(manifest))
    blocks += _samples(samples)
    blocks += ["## Sources", _table(tables.sources_table(manifest))]
    blocks += _optional("### Rejected documents", tables.rejected_table(manifest))
    blocks += _optional("### Examples of rejected documents", tables.examples_table(manifest))
    blocks += _optional("### Columns and keys that were not read", tables.unread_table(manifest))
    blocks += _optional("### Files", tables.files_table(manifest))
    blocks += ["### Tokenizer", _table(tables.tokenizer_table(manifest)), "## How to get it again"]
    blocks += [_fenced(manifest.command, "sh")] if manifest.command else []
    blocks += [f"Seed {manifest.seed}; SHA-256 of manifest.json: {manifest_sha256}"]
    blocks += [_table(tables.software_table(manifest)), _table(tables.hashes_table(manifest))]
    blocks += ["### Configuration", _fenced(json.dumps(manifest.config, indent=2, ensure_ascii=False), "json")]
    return "\n\n".join(blocks) + "\n"


def _mixture(manifest: DataManifest) -> Iterator[str]:
    domains = tables.domain_table(manifest)
    if domains is None:
        return
    yield "## Mixture"
    for name, stage in manifest.stages.items():
        yield f"### {escape(name)}"
        yield _table(tables.stage_table(manifest, stage))
    if len(manifest.stages) > 1:
        yield from _optional("### Domains over the stages", domains)


def _samples(samples: Samples) -> Iterator[str]:
    """Yield the boundaries of the first row of every row set."""
    first = [(path, rows[0]) for path, rows in samples.row_sets.items() if rows]
    if first:
        yield "## Samples"
    for path, sample in first:
        yield f"### {escape(path)}, row {sample.row}: {escape(sample_facts(sample))}"
        boundaries = [(f"{b.position:,}", escape(b.before), escape(b.after)) for b in sample.boundaries]
        yield markdown_table(["Position", "Before", "After"], boundaries, right=[0])


def _optional(heading: str, table: Table | None) -> list[str]:
    return [] if table is None else [heading, _table(table)]


def _table(table: Table) -> str:
    rows = [[f"*{escape(cell.text)}*" if cell.beyond else escape(cell.text) for cell in row] for row in table.rows]
    return markdown_table(list(map(escape, table.head)), rows, set(range(len(table.head))) - table.words)


def _fenced(text: str, language: str) -> str:
    """Return a code block whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
