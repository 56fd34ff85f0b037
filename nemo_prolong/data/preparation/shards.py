"""Rows of a plan to MDS shards: where shards begin is known from the plan, so any worker can write any shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.mds import ShardFormat
from nemo_prolong.data.packing import copy_pieces
from nemo_prolong.data.packing.arrays import Value
from nemo_prolong.data.preparation.rows import RowPlan
from nemo_prolong.data.preparation.token_store import map_mask, map_tokens
from nemo_prolong.data.preparation.workers import count_progress, disk_errors
from nemo_prolong.files import write_json_atomically

_COLUMNS = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "length": "uint64"}
_MAPPED_UNITS = 256


def shard_format(has_mask: bool, shard_bytes: int, compression: str) -> ShardFormat:
    """Return the format of a row set's shards."""
    columns = {**_COLUMNS, "mask": "ndarray:uint8"} if has_mask else _COLUMNS
    return ShardFormat(columns, shard_bytes, None if compression == "none" else compression)


def shard_bounds(plan: RowPlan, domains: Sequence[str], form: ShardFormat) -> list[int]:
    """Return the first row of every shard, and the number of rows.

    A shard takes rows as long as it does not grow beyond the limit, and at least one: the rule of a sequential writer.
    """
    sizes = [
        _row_bytes(form, domains[domain], tokens, documents)
        for domain, tokens, documents in zip(
            plan.row_domain.tolist(), plan.row_tokens.tolist(), plan.row_documents.tolist(), strict=True
        )
    ]
    bounds, used_bytes = [0], form.overhead_bytes
    for row, size in enumerate(sizes):
        if row > bounds[-1] and used_bytes + size > form.shard_bytes:
            bounds.append(row)
            used_bytes = form.overhead_bytes
        used_bytes += size
    return [*bounds, len(sizes)]


@lru_cache(maxsize=100_000)
def _row_bytes(form: ShardFormat, domain: str, tokens: int, documents: int) -> int:
    shapes = {"input_ids": (tokens,), "indices": (documents, 2), "mask": (tokens,)}
    return form.row_bytes({name: shapes.get(name, domain) for name in form.variable_columns})


@dataclass(frozen=True)
class ShardTask:
    """Write one shard of a row set; a task of ``workers.run_tasks``.

    Attributes:
        plan: Saved plan of the row set.
        units: Directory of each unit, as the plan numbers them.
        domains: Names of the row set's domains.
        form: Format of the shard.
        directory: MDS directory.
        number: Number of the shard.
        start: First row.
        stop: First row of the next shard.
        entry: File for its entry in the index, written last.
    """

    plan: Path
    units: tuple[Path, ...]
    domains: tuple[str, ...]
    form: ShardFormat
    directory: Path
    number: int
    start: int
    stop: int
    entry: Path

    def __call__(self) -> None:
        """Gather, encode, write.

        Raises:
            DataError: If the disk is full.
        """
        plan = _load_plan(self.plan)
        with disk_errors(self.directory):
            rows = []
            for number in range(self.start, self.stop):
                row = self._row(plan, number)
                rows.append(self.form.encode(row))
                count_progress(0, len(row["input_ids"]))
            entry = self.form.write_shard(self.directory, f"shard.{self.number:05d}.mds", rows)
            write_json_atomically(self.entry, entry)

    def finished(self) -> bool:
        """Return whether an earlier run has written it."""
        return self.entry.exists()

    def _row(self, plan: RowPlan, number: int) -> dict[str, Any]:
        pieces = slice(int(plan.row_bounds[number]), int(plan.row_bounds[number + 1]))
        ends = np.cumsum(plan.length[pieces])
        input_ids = self._gather(plan, pieces, _mapped_tokens)
        row = {
            "domain": self.domains[int(plan.row_domain[number])],
            "indices": np.stack([ends - plan.length[pieces], ends], axis=1).astype(np.uint32),
            "input_ids": input_ids,
            "length": len(input_ids),
        }
        if "mask" in self.form.columns:
            row["mask"] = self._gather(plan, pieces, _mapped_mask)
        return row

    def _gather(self, plan: RowPlan, pieces: slice, mapped: Callable[[Path], NDArray[Value]]) -> NDArray[Value]:
        """Copy pieces out of the units that hold them, those of one unit that follow each other together."""
        unit, offset, length = plan.unit[pieces], plan.offset[pieces], plan.length[pieces]
        changes = [0, *(np.flatnonzero(np.diff(unit)) + 1).tolist(), len(unit)]
        stretches = [slice(first, last) for first, last in pairwise(changes)]
        return np.concatenate(
            [copy_pieces(offset[own], length[own], mapped(self.units[int(unit[own.start])])) for own in stretches]
        )


def forget_files() -> None:
    """Close the plans and tokens that this process has mapped: another preparation may write under the same names."""
    for cached in (_load_plan, _mapped_tokens, _mapped_mask):
        cached.cache_clear()


@lru_cache(maxsize=4)
def _load_plan(directory: Path) -> RowPlan:
    return RowPlan.load(directory)


@lru_cache(maxsize=_MAPPED_UNITS)
def _mapped_tokens(directory: Path) -> NDArray[np.uint32]:
    return map_tokens(directory)


@lru_cache(maxsize=_MAPPED_UNITS)
def _mapped_mask(directory: Path) -> NDArray[np.uint8]:
    return map_mask(directory)


def read_entries(entries: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the index entries of finished shards."""
    return [json.loads(path.read_text("utf-8")) for path in entries]
