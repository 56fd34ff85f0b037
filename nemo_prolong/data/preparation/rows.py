"""What every row of a row set is made of, from the lengths of all documents: the plan that shard writers follow.

A plan is a pure function of lengths, configuration and seed. It is computed once, in one process, and saved, so that
any number of workers writes the same shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.config.schema.prepare import Packing, PrepareConfig, RowSet
from nemo_prolong.data.order import permutation
from nemo_prolong.data.packing import NO_TARGET, DocumentTargets, Layout, best_fit, concat, intact, split
from nemo_prolong.data.preparation.target_facts import PackedTargets, packed_targets, refuse_rows_without_targets
from nemo_prolong.data.preparation.token_store import TokenUnit, map_mask
from nemo_prolong.errors import DataError


@dataclass(frozen=True)
class DomainDocuments:
    """All documents of one domain and split, in the order in which they are packed.

    Attributes:
        lengths: Tokens of each, int64 [D].
        unit: Unit that holds each, as an index into the run's list of units, int64 [D].
        offset: First token in the unit, int64 [D].
        targets: Where their targets are; None where they have no masks and every token is one.
    """

    lengths: NDArray[np.int64]
    unit: NDArray[np.int64]
    offset: NDArray[np.int64]
    targets: DocumentTargets | None


def domain_documents(
    domain: str, held_out: bool, units: Sequence[tuple[int, TokenUnit]], shuffle_seed: int | None
) -> DomainDocuments:
    """Collect the documents of a domain.

    Args:
        domain: For messages and the seed of the order.
        held_out: Validation or training documents.
        units: (index in the run, unit) of every unit of the domain, in order.
        shuffle_seed: Draw the order from this seed; None keeps that of the sources.

    Raises:
        DataError: If only some documents of the domain have target masks.
    """
    masked = {unit.has_mask for _, unit in units if len(unit.lengths)}
    if len(masked) > 1:
        raise DataError(
            f"domain={domain}",
            "some of its documents have a target mask and others none.",
            "Put them into two domains.",
        )
    chosen = [unit.held_out == held_out for _, unit in units]
    lengths = _join([unit.lengths[mine] for (_, unit), mine in zip(units, chosen, strict=True)])
    index = _join([np.full(int(mine.sum()), number) for (number, _), mine in zip(units, chosen, strict=True)])
    offset = _join([_starts(unit.lengths)[mine] for (_, unit), mine in zip(units, chosen, strict=True)])
    if shuffle_seed is not None:
        seed = int.from_bytes(hashlib.sha256(f"{shuffle_seed}\0{domain}".encode()).digest()[:8], "big")
        order = permutation(len(lengths), seed, int(held_out), 0)
        lengths, index, offset = lengths[order], index[order], offset[order]
    directories = {number: unit.directory for number, unit in units}
    targets = DocumentTargets(lambda number: map_mask(directories[number]), index, offset, lengths)
    return DomainDocuments(lengths, index, offset, targets if True in masked else None)


def _join(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    joined: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)
    return joined


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    ends: NDArray[np.int64] = np.cumsum(lengths)
    return ends - lengths


@dataclass(frozen=True)
class RowPlan:
    """The pieces of every row of one row set.

    Attributes:
        row_bounds: int64 [R+1]; pieces of row r are ``row_bounds[r]:row_bounds[r + 1]``.
        row_domain: Which domain of the row set each row is from, int64 [R].
        unit: Unit of each piece, int64 [F].
        offset: Its first token in the unit, int64 [F].
        length: Its tokens, int64 [F].
    """

    row_bounds: NDArray[np.int64]
    row_domain: NDArray[np.int64]
    unit: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Rows of the row set."""
        return len(self.row_domain)

    @cached_property
    def row_documents(self) -> NDArray[np.int64]:
        """Documents in each row, int64 [R]."""
        return np.diff(self.row_bounds)

    @cached_property
    def row_tokens(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [R]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.length)])[self.row_bounds])

    def save(self, directory: Path) -> None:
        """Write one array file per attribute."""
        directory.mkdir(parents=True, exist_ok=True)
        for attribute in fields(self):
            np.save(directory / f"{attribute.name}.npy", getattr(self, attribute.name))

    def is_saved_in(self, directory: Path) -> bool:
        """Return whether this very plan was saved in a directory."""
        try:
            saved = self.load(directory)
        except (OSError, ValueError):
            return False
        return all(np.array_equal(getattr(saved, one.name), getattr(self, one.name)) for one in fields(self))

    @classmethod
    def load(cls, directory: Path) -> RowPlan:
        """Map a saved plan."""
        return cls(*(np.load(directory / f"{attribute.name}.npy", mmap_mode="r") for attribute in fields(cls)))


@dataclass(frozen=True)
class PackedSet:
    """A row set, laid out.

    Attributes:
        row_set: Its configuration.
        packing: How it was packed.
        plan: Its rows.
        targets: Their targets; None where its rows have no ``mask`` column.
        input_documents: Documents that went in.
        input_tokens: Their tokens: those in rows and those dropped.
        dropped_tokens: Reason to tokens.
        dropped_documents: Reason to documents of which nothing is in a row.
    """

    row_set: RowSet
    packing: Packing
    plan: RowPlan
    targets: PackedTargets | None
    input_documents: int
    input_tokens: int
    dropped_tokens: dict[str, int]
    dropped_documents: dict[str, int]


def packing_of(row_set: RowSet, conversations: bool) -> Packing:
    """Return how a row set is packed: what it says, else what its documents suggest."""
    if row_set.packing is not None:
        return row_set.packing
    if row_set.document_length is not None:
        return Packing.SPLIT
    return Packing.INTACT if conversations else Packing.CONCAT


def domains_of(row_set: RowSet) -> list[str]:
    """Return the domains of a row set."""
    return row_set.domain.split("+")


def pack_row_set(cfg: PrepareConfig, row_set: RowSet, documents: dict[str, DomainDocuments]) -> PackedSet:
    """Lay out one row set.

    Row sets that split the same documents (one domain, split and ``seq_length``) share them: the longest pieces are
    cut first, the shorter ones from what is left, so that no text is in both.

    Args:
        cfg: The whole configuration.
        row_set: One of its row sets.
        documents: Documents of each of its domains, of its split.

    Raises:
        DataError: If the documents do not fill a single row, packing leaves them no target, or only some of its domains
            have target masks.
    """
    domains = domains_of(row_set)
    conversations = any(source.holds_conversations for source in cfg.sources if source.domain in domains)
    packing = packing_of(row_set, conversations)
    packed = [_layouts(cfg, row_set, domain, packing, documents[domain]) for domain in domains]
    layouts = [layout for layout, _ in packed]
    _check_rows(row_set, packing, layouts, [documents[domain] for domain in domains])
    taken = _rows_taken([layout.num_rows for layout in layouts], row_set.max_rows)
    layouts = [layout.first_rows(rows) for layout, rows in zip(layouts, taken, strict=True)]
    dropped_tokens = _sum(layout.dropped_tokens for layout in layouts)
    plan = _interleave(layouts, [documents[domain] for domain in domains])
    found = [
        packed_targets(targets, layout, elsewhere)
        for domain, layout, (_, elsewhere) in zip(domains, layouts, packed, strict=True)
        if (targets := documents[domain].targets) is not None
    ]
    return PackedSet(
        row_set,
        packing,
        plan,
        targets=sum(found, PackedTargets()) if found else None,
        input_documents=sum(len(documents[domain].lengths) for domain in domains),
        input_tokens=int(plan.length.sum()) + sum(dropped_tokens.values()),
        dropped_tokens=dropped_tokens,
        dropped_documents=_sum(layout.dropped_documents for layout in layouts),
    )


def _layouts(
    cfg: PrepareConfig, row_set: RowSet, domain: str, packing: Packing, documents: DomainDocuments
) -> tuple[Layout, list[Layout]]:
    """Return the layout of a domain in a row set, and those of other row sets that split the same documents."""
    if packing is not Packing.SPLIT:
        pack = {Packing.CONCAT: concat, Packing.INTACT: intact, Packing.BEST_FIT: best_fit}[packing]
        return pack(documents.lengths, row_set.seq_length, documents.targets), []
    assert row_set.document_length is not None
    shared = [
        other.document_length
        for other in cfg.row_sets
        if domain in domains_of(other)
        and (other.split, other.seq_length) == (row_set.split, row_set.seq_length)
        and other.document_length is not None
    ]
    layouts = split(documents.lengths, shared, row_set.seq_length, documents.targets)
    return layouts.pop(row_set.document_length), list(layouts.values())


def _check_rows(
    row_set: RowSet, packing: Packing, layouts: Sequence[Layout], documents: Sequence[DomainDocuments]
) -> None:
    targets = [one.targets for one in documents if one.targets is not None]
    if len(targets) not in (0, len(documents)):
        raise DataError(
            f"row_sets: {row_set.path}: domain={row_set.domain}",
            "some of its domains have target masks and others none.",
            "Make a row set of each.",
        )
    if sum(layout.num_rows for layout in layouts):
        return
    if targets:
        refuse_rows_without_targets(row_set, packing, layouts, targets)
    tokens = sum(int(one.lengths.sum()) for one in documents)
    longest = max((int(one.lengths.max(initial=0)) for one in documents), default=0)
    untaught = sum(layout.dropped_tokens.get(NO_TARGET, 0) for layout in layouts)
    raise DataError(
        f"row set {row_set.path}",
        f"the {row_set.split} documents of {row_set.domain} do not fill one row of {row_set.seq_length} tokens: "
        f"they have {tokens} tokens, the longest {longest}"
        + (f", and {untaught} of them are left out because they have no target." if untaught else "."),
        "Give more text" + (", or raise validation_fraction." if row_set.split == "validation" else "."),
    )


def _rows_taken(available: Sequence[int], max_rows: int | None) -> list[int]:
    """Return how many rows each domain gives when they come in turns and stop after ``max_rows``."""
    order = list(_turns(available))[:max_rows]
    return [sum(1 for domain, _ in order if domain == number) for number in range(len(available))]


def _turns(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (domain, row), one row of each domain in turn as long as it has any."""
    per_domain = [[(domain, row) for row in range(count)] for domain, count in enumerate(rows)]
    return (place for place in chain.from_iterable(zip_longest(*per_domain)) if place is not None)


def _interleave(layouts: Sequence[Layout], documents: Sequence[DomainDocuments]) -> RowPlan:
    """Make one plan of the layouts of the domains, their rows in turns."""
    order = np.array(list(_turns([layout.num_rows for layout in layouts])), np.int64).reshape(-1, 2)
    first_row = _starts(np.array([layout.num_rows for layout in layouts]))
    pieces = _join([np.diff(layout.row_bounds) for layout in layouts])
    piece_starts = _starts(pieces)
    rows = first_row[order[:, 0]] + order[:, 1]
    bounds = np.concatenate([[0], np.cumsum(pieces[rows])]).astype(np.int64)
    chosen = np.repeat(piece_starts[rows] - bounds[:-1], pieces[rows]) + np.arange(bounds[-1])
    return RowPlan(
        row_bounds=bounds,
        row_domain=order[:, 0],
        unit=_join([docs.unit[layout.document] for layout, docs in zip(layouts, documents, strict=True)])[chosen],
        offset=_join(
            [docs.offset[layout.document] + layout.start for layout, docs in zip(layouts, documents, strict=True)]
        )[chosen],
        length=_join([layout.length for layout in layouts])[chosen],
    )


def _sum(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for reason, count in chain.from_iterable(part.items() for part in counts):
        total[reason] = total.get(reason, 0) + count
    return total
