"""What ``manifest.json`` says of a data directory: what went in, what came out, what was dropped and why.

It holds nothing that differs between two runs with the same result: no time, no number of workers, no place on disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.schema.prepare import PreparedStage
from nemo_prolong.data.order import GlobalOrder
from nemo_prolong.data.preparation.catalog import PlannedSource
from nemo_prolong.data.preparation.rows import PackedSet
from nemo_prolong.data.preparation.token_store import TokenUnit
from nemo_prolong.data.sources.meaning import columns_to_check
from nemo_prolong.records.data_manifest import (
    DomainSplit,
    LengthHistogram,
    Rejection,
    RowSetFacts,
    ShardFacts,
    SourceFacts,
    StageFacts,
    StageRowSet,
)

_REJECTED_EXAMPLES = 10


def length_histogram(lengths: NDArray[np.int64]) -> LengthHistogram:
    """Count documents and their tokens in buckets that double.

    Args:
        lengths: Tokens of each document, positive int64 [D].
    """
    buckets = np.frexp(lengths.astype(np.float64))[1] - 1
    return LengthHistogram(
        documents=np.bincount(buckets).tolist(),
        tokens=[int(lengths[buckets == bucket].sum()) for bucket in range(int(buckets.max(initial=-1)) + 1)],
    )


def source_facts(planned: Sequence[tuple[PlannedSource, Sequence[TokenUnit]]]) -> list[SourceFacts]:
    """Return an entry per source: its files with hashes, and how much it gave."""
    return [_source_facts(source, units) for source, units in planned]


def _source_facts(planned: PlannedSource, units: Sequence[TokenUnit]) -> SourceFacts:
    files = [file for unit in units for file in unit.facts.files]
    rejected: dict[str, Rejection] = {}
    for reason, count in ((r, c) for unit in units for r, c in unit.facts.rejected.items()):
        rejected[reason] = rejected.get(reason, Rejection(documents=0, bytes=0)) + count
    examples = [example for unit in units for example in unit.facts.rejected_examples]
    unread = _summed(unit.facts.unread_columns for unit in units)
    return SourceFacts(
        domain=planned.configured.domain,
        format=planned.configured.format.value,
        path=planned.configured.path,
        split=planned.source.split,
        files=files,
        input_bytes=sum(file.bytes for file in files),
        documents=sum(unit.facts.documents for unit in units),
        tokens=sum(unit.facts.tokens for unit in units),
        rejected=rejected,
        rejected_examples=examples[:_REJECTED_EXAMPLES],
        unread_columns=unread,
        columns_to_check=columns_to_check(planned.source, unread),
        dropped_keys=_summed(unit.facts.dropped_keys for unit in units),
    )


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Return counts by name, the most frequent first."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def domain_facts(planned: Sequence[tuple[PlannedSource, Sequence[TokenUnit]]]) -> dict[str, dict[str, DomainSplit]]:
    """Return documents, tokens and length histogram of every domain and split that has any."""
    lengths: dict[tuple[str, str], list[NDArray[np.int64]]] = defaultdict(list)
    for source, units in planned:
        for unit in units:
            lengths[source.source.domain, "train"].append(unit.lengths[~unit.held_out])
            lengths[source.source.domain, "validation"].append(unit.lengths[unit.held_out])
    facts: dict[str, dict[str, DomainSplit]] = defaultdict(dict)
    for (domain, split), parts in lengths.items():
        joined = np.concatenate(parts)
        if len(joined):
            facts[domain][split] = DomainSplit(
                documents=len(joined), tokens=int(joined.sum()), length_histogram=length_histogram(joined)
            )
    return dict(facts)


def row_set_facts(packed: PackedSet, index: Path, entries: Sequence[dict[str, Any]]) -> RowSetFacts:
    """Return the entry of a row set.

    Args:
        packed: The row set.
        index: Its ``index.json``.
        entries: Index entries of its shards.
    """
    plan, row_set, targets = packed.plan, packed.row_set, packed.targets
    tokens = int(plan.length.sum())
    files = [entry["zip_data"] or entry["raw_data"] for entry in entries]
    shards = {file["basename"]: ShardFacts(bytes=file["bytes"], sha256=file["hashes"]["sha256"]) for file in files}
    return RowSetFacts(
        domain=row_set.domain,
        split=row_set.split,
        packing=packed.packing.value,
        seq_length=row_set.seq_length,
        document_length=row_set.document_length,
        rows=plan.num_rows,
        documents=len(plan.length),
        tokens=tokens,
        fill=round(tokens / (plan.num_rows * row_set.seq_length), 6),
        input_documents=packed.input_documents,
        input_tokens=packed.input_tokens,
        dropped_tokens=packed.dropped_tokens,
        dropped_documents=packed.dropped_documents,
        target_tokens=None if targets is None else targets.in_rows,
        input_target_tokens=None if targets is None else targets.input,
        cut_documents=None if targets is None else targets.cut_documents,
        cut_target_tokens=None if targets is None else targets.cut,
        sum_squared_lengths=int(np.dot(plan.length, plan.length)),
        length_histogram=length_histogram(np.asarray(plan.length)),
        sha256=row_set_sha256(index.read_bytes(), shards),
        shards=shards,
    )


def row_set_sha256(index: bytes, shards: dict[str, ShardFacts]) -> str:
    """Return one hash over the index and all shards of a row set."""
    lines = [hashlib.sha256(index).hexdigest(), *(f"{name} {shards[name].sha256}" for name in sorted(shards))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def stage_facts(
    stages: dict[str, PreparedStage], rows: dict[str, int], seq_lengths: dict[str, int]
) -> dict[str, StageFacts]:
    """Return, per stage, how many rows it takes from each row set and how often it walks through it.

    Args:
        stages: The stages that the rows are for.
        rows: Rows of every row set.
        seq_lengths: Tokens per row of every row set.
    """
    return {name: _stage_facts(stage, rows, seq_lengths) for name, stage in stages.items()}


def _stage_facts(stage: PreparedStage, rows: dict[str, int], seq_lengths: dict[str, int]) -> StageFacts:
    mixture = stage.data.mixture
    order = GlobalOrder([rows[entry.path] for entry in mixture], [entry.proportion for entry in mixture], 0)
    num_rows = -(-stage.tokens // seq_lengths[mixture[0].path])
    facts = zip(mixture, order.draws(num_rows), order.epochs(num_rows), strict=True)
    return StageFacts(
        tokens=stage.tokens,
        row_sets={
            entry.path: StageRowSet(proportion=entry.proportion, rows_taken=taken, epochs=round(epochs, 4))
            for entry, taken, epochs in facts
        },
    )


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes."""
    return {"tokenizers": tokenizers.__version__}


def command_line(arguments: Iterable[str]) -> str:
    """Return the command that gives this result, without what changes nothing in it."""
    kept = [a for a in arguments if a.split("=")[0].lstrip("+~") not in ("output", "workers", "cache")]
    return shell_command(["python", "scripts/prepare_data.py", *kept])
