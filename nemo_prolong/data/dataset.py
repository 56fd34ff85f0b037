"""Packed rows as training samples: labels inside documents, positions that restart, masks and padding.

A sample is built from one MDS row (``stored_row``) and nothing else, so a directory that ProLong published trains
unchanged. ``labels`` are already shifted: position i predicts token i + 1 of
the same document. What a row must be is checked when it is read, and for the first row of every directory when the
data set is made, so that a wrong directory is refused before training starts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.batch import PackedBatch, PackedRow
from nemo_prolong.data.mds import MdsReader
from nemo_prolong.data.order import GlobalOrder
from nemo_prolong.data.stored_row import IntArray, StoredRow
from nemo_prolong.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowFormat:
    """What a row must be and what is made of it.

    Attributes:
        seq_length: Tokens of a training row; shorter rows are padded, longer ones refused.
        apply_instruct_masks: Train only on tokens whose ``mask`` is 1.
        vocab_size: Smallest token id that does not exist; None trusts the data.
    """

    seq_length: int
    apply_instruct_masks: bool = False
    vocab_size: int | None = None


class PackedRowDataset(Dataset[PackedRow]):
    """The rows of a stage in their global order; index = global row index.

    Args:
        root: Directory or ``s3://`` address that holds the row sets.
        mixture: Row sets below ``root`` and their shares.
        seq_length: Tokens per row.
        seed: Seed of the order.
        num_rows: Rows of the stage; ``len`` of the data set. Does not change which row an index means.
        apply_instruct_masks: Train only on tokens whose ``mask`` column is 1.
        vocab_size: Refuse token ids from here on; None trusts the data.
        cache: Local directory for copies of remote and compressed shards; None takes the default.

    Raises:
        DataError: If a directory is missing, empty or damaged, or its rows do not fit the arguments.
        ConfigError: If the proportions do not sum to 1.
    """

    def __init__(
        self,
        root: str | Path,
        mixture: Sequence[MixtureEntry],
        seq_length: int,
        seed: int,
        num_rows: int,
        apply_instruct_masks: bool = False,
        vocab_size: int | None = None,
        cache: str | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.paths = [entry.path for entry in mixture]
        self._format = RowFormat(seq_length, apply_instruct_masks, vocab_size)
        self._readers = _open_row_sets(root, self.paths, self._format, cache)
        self._order = GlobalOrder([len(reader) for reader in self._readers], [e.proportion for e in mixture], seed)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> PackedRow:
        """Return row ``index`` of the stage.

        Raises:
            DataError: If the stored row is damaged or does not fit.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        directory, row = self._order.locate(index)
        return _read_row(self._readers[directory], row, self._format)

    def place(self, index: int) -> str:
        """Return where row ``index`` of the stage is stored, for messages."""
        directory, row = self._order.locate(index)
        return f"{self._readers[directory].directory} row {row}"

    def epochs(self) -> dict[str, float]:
        """Return how often the stage walks through each row set."""
        return dict(zip(self.paths, self._order.epochs(self.num_rows), strict=True))


class ValidationRowDataset(Dataset[PackedRow]):
    """Every row of some row sets once, in stored order, one set after the other in turn.

    Args:
        root: Directory that holds the row sets.
        paths: Row sets below ``root``.
        seq_length: Tokens per row.
        apply_instruct_masks: Score only tokens whose ``mask`` column is 1.
        vocab_size: Refuse token ids from here on; None trusts the data.
        cache: As for PackedRowDataset.

    Raises:
        DataError: As for PackedRowDataset.
    """

    def __init__(
        self,
        root: str | Path,
        paths: Sequence[str],
        seq_length: int,
        apply_instruct_masks: bool = False,
        vocab_size: int | None = None,
        cache: str | None = None,
    ) -> None:
        self._format = RowFormat(seq_length, apply_instruct_masks, vocab_size)
        self._readers = _open_row_sets(root, paths, self._format, cache)
        places = [(row, directory) for directory, reader in enumerate(self._readers) for row in range(len(reader))]
        self._places = sorted(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PackedRow:
        row, directory = self._places[index]
        return _read_row(self._readers[directory], row, self._format)


def collate_rows(rows: Sequence[PackedRow]) -> PackedBatch:
    """Make the micro-batch of one row.

    Args:
        rows: One row; packing puts many documents in it, so more rows per pass gain nothing.

    Raises:
        ConfigError: If there is not exactly one row.
    """
    if len(rows) != 1:
        raise ConfigError(
            f"train.micro_batch_size={len(rows)}",
            "a packed row already fills a forward pass.",
            "Use train.micro_batch_size=1 and a longer seq_length or a larger global_batch_size.",
        )
    row = rows[0]
    return PackedBatch(
        tokens=row.tokens.unsqueeze(0),
        labels=row.labels.unsqueeze(0),
        loss_mask=row.loss_mask.unsqueeze(0),
        position_ids=row.position_ids.unsqueeze(0),
        cu_seqlens=row.cu_seqlens,
        max_seqlen=int(row.cu_seqlens.diff().max()),
        domain=row.domain,
        real_tokens=row.real_tokens,
    )


def build_row(stored: dict[str, Any], row_format: RowFormat, where: str) -> PackedRow:
    """Return the training sample of one stored row.

    Args:
        stored: Columns of an MDS row, as ``StoredRow`` reads them.
        row_format: What it must be.
        where: What to name in an error.

    Raises:
        DataError: If the row has a fault (``StoredRow``), is too long, has a token id out of range or lacks ``mask``.
    """
    seq_length = row_format.seq_length
    row = StoredRow.of(stored).checked(where)
    ids, bounds = row.ids, row.bounds
    _check_ids(ids, row_format, where)
    if len(ids) < seq_length:
        bounds = np.append(bounds, seq_length)
    tokens = np.zeros(seq_length, np.int64)
    tokens[: len(ids)] = ids
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    loss_mask = np.zeros(seq_length, np.float32)
    loss_mask[: len(ids)] = 1.0
    loss_mask[bounds[1:] - 1] = 0.0
    if row_format.apply_instruct_masks:
        loss_mask[: len(ids) - 1] *= _mask_of(row, where)[1:]
    labels = np.zeros(seq_length, np.int64)
    labels[:-1] = tokens[1:]
    labels[loss_mask == 0] = 0
    return PackedRow(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(np.arange(seq_length) - starts),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        domain=row.domain,
        real_tokens=len(ids),
    )


def _check_ids(ids: IntArray, row_format: RowFormat, where: str) -> None:
    if len(ids) > row_format.seq_length:
        raise DataError(
            f"seq_length={row_format.seq_length}",
            f"{where} has {len(ids)} tokens.",
            f"Set seq_length={len(ids)}, or use row sets of {row_format.seq_length} tokens.",
        )
    if int(ids.min()) < 0 or (row_format.vocab_size is not None and int(ids.max()) >= row_format.vocab_size):
        raise DataError(
            where,
            f"has token ids from {ids.min()} to {ids.max()}, model.vocab_size is {row_format.vocab_size}.",
            "Use the tokenizer of the model to prepare the data.",
        )


def _mask_of(row: StoredRow, where: str) -> NDArray[np.uint8]:
    if row.mask is None:
        raise DataError(
            "data.apply_instruct_masks=true",
            f"{where} has no mask column.",
            "Use chat rows, or set data.apply_instruct_masks=false.",
        )
    return row.mask


def _read_row(reader: MdsReader, row: int, row_format: RowFormat) -> PackedRow:
    return build_row(reader[row], row_format, f"{reader.directory} row {row}")


def _open_row_sets(root: str | Path, paths: Sequence[str], row_format: RowFormat, cache: str | None) -> list[MdsReader]:
    readers = []
    for path in paths:
        reader = MdsReader(f"{str(root).rstrip('/')}/{path}", cache)
        if not len(reader):
            raise DataError(f"{reader.directory}", "has no rows.", "Prepare more text for it, or leave it out.")
        first = _read_row(reader, 0, row_format)
        if first.real_tokens < row_format.seq_length:
            log.warning(
                "%s has rows of %d tokens; each is padded to seq_length=%d",
                reader.directory,
                first.real_tokens,
                row_format.seq_length,
            )
        readers.append(reader)
    return readers
