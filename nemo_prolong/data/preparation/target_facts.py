"""What packing leaves of the targets of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.config.schema.prepare import Packing, RowSet
from nemo_prolong.data.packing import NO_TARGET, DocumentTargets, Layout
from nemo_prolong.errors import DataError
from nemo_prolong.text import counted


@dataclass(frozen=True)
class PackedTargets:
    """Tokens with a loss, in rows and not.

    Attributes:
        in_rows: Those of the rows.
        input: Those that the documents have as a whole.
        cut_documents: Documents in rows of which some are in no row.
        cut: Those of such documents that are in no row.
    """

    in_rows: int = 0
    input: int = 0
    cut_documents: int = 0
    cut: int = 0

    def __add__(self, other: PackedTargets) -> PackedTargets:
        return PackedTargets(
            self.in_rows + other.in_rows,
            self.input + other.input,
            self.cut_documents + other.cut_documents,
            self.cut + other.cut,
        )


def packed_targets(targets: DocumentTargets, layout: Layout, elsewhere: Sequence[Layout] = ()) -> PackedTargets:
    """Return what the rows of one domain have of its targets.

    Args:
        targets: Of the documents.
        layout: The rows.
        elsewhere: Other rows that the same documents are shared with. What is there is not lost.
    """
    totals = targets.totals()
    in_rows = _targets_in(layout, targets)
    kept = in_rows + sum(_targets_in(other, targets) for other in elsewhere)
    is_in_rows = np.bincount(layout.document, minlength=len(totals)) > 0
    lost = np.where(is_in_rows, totals - kept, 0)
    return PackedTargets(
        in_rows=int(in_rows.sum()),
        input=int(totals.sum()),
        cut_documents=int(np.count_nonzero(lost)),
        cut=int(lost.sum()),
    )


def _targets_in(layout: Layout, targets: DocumentTargets) -> NDArray[np.int64]:
    """Return how many targets of each document a layout has, int64 [D]."""
    found = np.zeros(len(targets.lengths), np.int64)
    np.add.at(found, layout.document, targets.count(layout.document, layout.start, layout.length))
    return found


def refuse_rows_without_targets(
    row_set: RowSet, packing: Packing, layouts: Sequence[Layout], targets: Sequence[DocumentTargets]
) -> None:
    """Refuse a row set of which packing has left nothing because there is nothing to learn.

    Args:
        row_set: Its configuration.
        packing: How it was packed.
        layouts: Its rows by domain, of which there are none.
        targets: Targets of the documents of each domain.

    Raises:
        DataError: If every document was left out for having no target.
    """
    documents = sum(len(one.lengths) for one in targets)
    if not documents or sum(layout.dropped_documents[NO_TARGET] for layout in layouts) < documents:
        return
    named = f"{counted(documents, f'{row_set.split} document')} of {row_set.domain}"
    first = np.concatenate([one.first()[one.totals() > 0] for one in targets])
    if not len(first):
        raise DataError(
            f"row set {row_set.path}",
            f"there is no target token in {named}, as their masks say, so there is nothing to learn.",
            "Look at what marks the targets (docs/data.md), or leave the row set out.",
        )
    length = row_set.document_length if packing is Packing.SPLIT else row_set.seq_length
    longest = max(int(one.lengths.max(initial=0)) for one in targets)
    # Pieces of one length keep no short document, and few conversations have just that length.
    way = "packing=intact and " if packing is Packing.SPLIT else ""
    raise DataError(
        f"row set {row_set.path}",
        f"no target token is left of {named}: {packing} keeps pieces of {length} tokens, and the first target comes "
        f"after {first.min()} tokens or more.",
        f"Set {way}seq_length={1 << (longest - 1).bit_length()}, which holds the longest document whole ({longest} "
        "tokens), or give shorter documents.",
    )
