"""Tokenized documents on disk between tokenizing and packing, one directory per unit of work.

A unit's directory holds ``tokens.bin`` (uint32, all documents in order), ``lengths.npy`` (int64 [D]), ``held_out.npy``
(bool [D]), ``mask.bin`` (uint8, only where documents have target masks) and ``unit.json`` (counts and what was
rejected). It appears by rename, so a unit exists wholly or not at all. Huge documents pass through in parts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nemo_prolong.data.packing.arrays import Value
from nemo_prolong.data.sources.base import Rejected, Unread
from nemo_prolong.errors import DataError
from nemo_prolong.files import publish, sync, synced_file, write_json_atomically
from nemo_prolong.records.data_manifest import FileFacts, RejectedExample, Rejection

TOKEN_DTYPE = np.dtype("<u4")
_EXAMPLES = 5
"""Rejected documents kept as examples, per unit."""


class UnitFacts(BaseModel):
    """``unit.json``.

    Attributes:
        documents: Documents of the unit.
        tokens: Their tokens.
        rejected: Reason to the documents that were left out for it.
        rejected_examples: The first of them.
        files: The files that the unit answers for.
        unread_columns: Column that was not read to the records that have it.
        dropped_keys: Key of messages to the messages that lost it.
    """

    model_config = ConfigDict(frozen=True)

    documents: int
    tokens: int
    rejected: dict[str, Rejection]
    rejected_examples: list[RejectedExample]
    files: list[FileFacts]
    unread_columns: dict[str, int] = {}
    dropped_keys: dict[str, int] = {}


class TokenWriter:
    """Write the documents of one unit.

    Args:
        directory: Directory to create; a finished one is never overwritten.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # The process id keeps a dying worker of a killed run away from the one that repeats its work.
        self._partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
        self._lengths: list[int] = []
        self._held_out: list[bool] = []
        self._rejected: dict[str, Rejection] = {}
        self._examples: list[RejectedExample] = []
        self._unread = Unread()
        self._open_length = 0
        self._mask_used: bool | None = None

    def __enter__(self) -> TokenWriter:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._tokens = (self._partial / "tokens.bin").open("wb")
        self._mask = (self._partial / "mask.bin").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._mask.close()
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)

    @property
    def tokens(self) -> int:
        """Tokens of the finished documents."""
        return sum(self._lengths)

    def append(self, input_ids: NDArray[np.integer[Any]], mask: NDArray[np.integer[Any]] | None = None) -> None:
        """Add tokens to the open document.

        Args:
            input_ids: Integers [T] below 2^32.
            mask: uint8 [T], 1 on targets; given for every document of a unit or for none.

        Raises:
            DataError: If only some documents have a mask.
        """
        if self._mask_used is None:
            self._mask_used = mask is not None
        if self._mask_used != (mask is not None):
            raise DataError(
                f"document {len(self._lengths)} of the unit",
                "has a target mask and others have none, or the other way round.",
                "Put documents with and without a mask into different domains.",
            )
        self._tokens.write(np.ascontiguousarray(input_ids, TOKEN_DTYPE).data)
        if mask is not None:
            self._mask.write(np.ascontiguousarray(mask, np.uint8).data)
        self._open_length += len(input_ids)

    def finish_document(self, held_out: bool) -> None:
        """Close the open document, which has at least one token."""
        assert self._open_length > 0
        self._lengths.append(self._open_length)
        self._held_out.append(held_out)
        self._open_length = 0

    def abandon_document(self) -> None:
        """Forget what was appended since the last finished document."""
        self._open_length = 0
        self._tokens.seek(self.tokens * TOKEN_DTYPE.itemsize)
        self._tokens.truncate()
        if self._mask_used:
            self._mask.seek(self.tokens)
            self._mask.truncate()

    def reject(self, rejected: Rejected) -> None:
        """Count a document that is left out."""
        before = self._rejected.get(rejected.reason, Rejection(documents=0, bytes=0))
        self._rejected[rejected.reason] = before + Rejection(documents=1, bytes=rejected.num_bytes)
        if len(self._examples) < _EXAMPLES:
            self._examples.append(
                RejectedExample(
                    key=rejected.key, reason=rejected.reason, bytes=rejected.num_bytes, detail=rejected.detail
                )
            )

    def note_unread(self, unread: Unread) -> None:
        """Keep what the reader did not read of the unit."""
        self._unread = unread

    def publish(self, files: Sequence[FileFacts]) -> None:
        """Make the unit readable.

        Args:
            files: The files that this unit answers for.
        """
        assert self._open_length == 0
        for file in (self._tokens, self._mask):
            file.flush()
            sync(Path(file.name))
        if not self._mask_used:
            (self._partial / "mask.bin").unlink()
        arrays = {"lengths": np.array(self._lengths, np.int64), "held_out": np.array(self._held_out, bool)}
        for name, values in arrays.items():
            with synced_file(self._partial / f"{name}.npy") as array_file:
                np.save(array_file, values)
        facts = UnitFacts(
            documents=len(self._lengths),
            tokens=self.tokens,
            rejected=self._rejected,
            rejected_examples=self._examples,
            files=list(files),
            unread_columns=+self._unread.columns,
            dropped_keys=+self._unread.keys,
        )
        write_json_atomically(self._partial / "unit.json", facts.model_dump())
        publish(self._partial, self._directory)


@dataclass(frozen=True)
class TokenUnit:
    """A finished unit.

    Attributes:
        directory: Where it lies.
        lengths: Tokens of each document, int64 [D].
        held_out: Which documents are for validation, bool [D].
        facts: ``unit.json``.
    """

    directory: Path
    lengths: NDArray[np.int64] = field(repr=False)
    held_out: NDArray[np.bool_] = field(repr=False)
    facts: UnitFacts = field(repr=False)

    @classmethod
    def open(cls, directory: Path) -> TokenUnit:
        """Read the small files of a unit."""
        return cls(
            directory,
            np.load(directory / "lengths.npy"),
            np.load(directory / "held_out.npy"),
            UnitFacts.model_validate(json.loads((directory / "unit.json").read_text("utf-8"))),
        )

    @property
    def has_mask(self) -> bool:
        """Whether its documents have target masks."""
        return (self.directory / "mask.bin").exists()


def map_tokens(directory: Path) -> NDArray[np.uint32]:
    """Return the tokens of a unit, uint32 [T], memory-mapped; a unit without tokens gives an empty array."""
    return _map(directory / "tokens.bin", TOKEN_DTYPE)


def map_mask(directory: Path) -> NDArray[np.uint8]:
    """Return the mask of a unit, uint8 [T], memory-mapped."""
    return _map(directory / "mask.bin", np.dtype(np.uint8))


def _map(path: Path, dtype: np.dtype[Value]) -> NDArray[Value]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
