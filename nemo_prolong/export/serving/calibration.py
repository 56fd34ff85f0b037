"""What FP8 is calibrated on: documents of the rows that the run itself was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_prolong.config.schema import MixtureEntry
from nemo_prolong.data.batch import PackedRow
from nemo_prolong.data.dataset import PackedRowDataset
from nemo_prolong.data.row_origins import row_origins
from nemo_prolong.data.run_tokenizer import require_rows_of
from nemo_prolong.errors import ExportError
from nemo_prolong.records.stage_manifest import DataRecord, StageManifest

SEED = 0
"""Of the order of rows; recorded with every export by being fixed."""


def calibration_documents(manifest: StageManifest, rows: int, length: int) -> list[Tensor]:
    """Return the documents of the first rows, each by itself, as training sees them.

    Args:
        manifest: Of the run.
        rows: Packed rows to take.
        length: Tokens of a document that are taken.

    Returns:
        int64 [T] each, ``1 < T <= length``.

    Raises:
        DataError: If the run's data is gone or damaged, or a row set is of another tokenizer than the run.
        ExportError: If the rows hold no document of two tokens.
    """
    data = manifest.data
    _check_tokenizer(data)
    dataset = PackedRowDataset(
        data.location,
        [MixtureEntry(path=entry["path"], proportion=entry["proportion"]) for entry in data.mixture],
        manifest.seq_length,
        SEED,
        rows,
        vocab_size=manifest.model.vocab_size,
    )
    documents = [document for index in range(rows) for document in _documents(dataset[index], length)]
    if not documents:
        raise ExportError(
            f"export.calibration_rows={rows}",
            f"the rows of {data.root} hold no document of two tokens.",
            "Calibrate on more rows.",
        )
    return documents


def _check_tokenizer(data: DataRecord) -> None:
    """Refuse rows that came into the run's data directory after it was trained."""
    tokenizer, root = data.tokenizer_directory, data.location.rstrip("/")
    origins = {f"data.mixture path={entry['path']}": row_origins(f"{root}/{entry['path']}") for entry in data.mixture}
    require_rows_of(tokenizer, str(tokenizer), origins, "Restore the data that the run was trained on.")


def _documents(row: PackedRow, length: int) -> Iterator[Tensor]:
    """Yield the documents of a row without the padding at its end; a single token says nothing."""
    edges = torch.clamp(row.cu_seqlens, max=row.real_tokens).tolist()
    for start, end in itertools.pairwise(edges):
        if end - start > 1:
            yield row.tokens[start : min(end, start + length)]
