"""Rows that loader processes read: what goes wrong there is an error of this process, with the same message.

torch raises an error of a worker again by calling its class with one text, which holds the traceback. Ours take three
parts. So a row that cannot be read comes over as a ``RowFailure`` in its place, and is raised when its turn comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Dataset

from nemo_prolong.data.batch import PackedBatch, PackedRow
from nemo_prolong.data.dataset import collate_rows
from nemo_prolong.errors import DataError, ProlongError

_WORKER_DIED = "DataLoader worker (pid"
"""Begins what torch raises where a loader process is gone, by a signal or by its own exit."""


class Rows(Protocol):
    """A data set of packed rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> PackedRow: ...


@dataclass(frozen=True)
class RowFailure:
    """A row that could not be read, in place of it.

    Attributes:
        error: Why.
    """

    error: ProlongError


class LoadedRows(Dataset[PackedRow | RowFailure]):
    """Rows as a loader process hands them over; one that cannot be read is a ``RowFailure``.

    Args:
        rows: The data set.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PackedRow | RowFailure:
        try:
            return self._rows[index]
        except ProlongError as error:
            return RowFailure(error)
        except MemoryError:
            return RowFailure(_out_of_memory(f"row {index}"))
        except OSError as error:
            rule = f"cannot be read ({error.strerror or error})."
            what = str(error.filename or f"row {index}")
            return RowFailure(DataError(what, rule, "Repair the file system, then run the same command again."))


def collate_loaded(rows: Sequence[PackedRow | RowFailure]) -> PackedBatch | RowFailure:
    """Return the micro-batch of one row, or the first failure."""
    good = [row for row in rows if isinstance(row, PackedRow)]
    failures = [row for row in rows if isinstance(row, RowFailure)]
    return failures[0] if failures else collate_rows(good)


def next_batch(loader: Iterator[Any]) -> PackedBatch:
    """Return the next micro-batch.

    Args:
        loader: Gives what ``collate_loaded`` returns, or, as Lightning's does, a tuple that begins with it.

    Raises:
        ProlongError: What went wrong when it was read, in a loader process or here.
        DataError: If the loader process is gone.
    """
    try:
        loaded = next(loader)
    except (ConnectionError, EOFError) as error:
        # It died while it was handing over what it had read.
        raise _worker_is_gone() from error
    batch: PackedBatch | RowFailure = loaded[0] if isinstance(loaded, tuple) else loaded
    if isinstance(batch, RowFailure):
        raise batch.error
    return batch


@contextlib.contextmanager
def explained_worker_deaths() -> Iterator[None]:
    """Say what to do where a loader process is gone.

    Raises:
        DataError: If one was killed or ended. torch raises it wherever this process is at that moment.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_WORKER_DIED):
            raise
        raise _worker_is_gone() from error


def _worker_is_gone() -> DataError:
    return DataError(
        "data.num_workers",
        "a loader process was killed, most likely because memory or shared memory ran out.",
        "Lower data.num_workers, ask for more memory, or give /dev/shm more room, such as --shm-size=8g of a container."
        " The same command continues.",
    )


def _out_of_memory(what: str) -> DataError:
    return DataError(what, "memory ran out while it was read.", "Lower data.num_workers, or ask for more memory.")
