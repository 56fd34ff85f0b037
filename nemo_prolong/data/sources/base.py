"""What a reader of a source gives: units of work, and the documents of a unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_prolong.data.conversation import Conversation
from nemo_prolong.data.storage.files import SourceFile


@dataclass(frozen=True)
class Unit:
    """A part of a source that one worker reads: files, or a range of one file.

    Units and their order follow from the source alone, never from the number of workers.

    Attributes:
        files: What is read.
        start: First byte, row group, row or shard of the range, as the format counts.
        stop: End of the range; None reads to the end.
        num_bytes: About how much input this is, for progress.
    """

    files: tuple[SourceFile, ...]
    start: int = 0
    stop: int | None = None
    num_bytes: int = 0


@dataclass(frozen=True)
class Document:
    """One document, with exactly one of ``pieces``, ``conversation`` and ``input_ids``.

    Attributes:
        key: Names it in messages and manifests: ``file.jsonl:17``, a path, a repository.
        group: What is held out together; the key where a source has no groups.
        pieces: Its text in order, readable once; a huge document comes in many pieces.
        conversation: The conversation that it is.
        input_ids: Its tokens, integers [T], where it comes tokenized.
        mask: With ``input_ids``: uint8 [T], 1 on targets, or None.
        whole: False where the document is a span of a packed row: no BOS or EOS is added to it.
    """

    key: str
    group: str
    pieces: Iterable[str] | None = None
    conversation: Conversation | None = None
    input_ids: NDArray[np.integer[Any]] | None = None
    mask: NDArray[np.integer[Any]] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Rejected:
    """A document that could not be read, where the user asked to drop such documents.

    Attributes:
        key: As for a document.
        reason: ``invalid_json``, ``invalid_utf8``, ``missing_field``, ``wrong_type``, ``empty_document``, ...
        num_bytes: Its size as far as it is known.
        detail: What was wrong, for a person.
    """

    key: str
    reason: str
    num_bytes: int
    detail: str


@dataclass
class Unread:
    """What lies in the records of a unit and is in none of its documents; readers count it while they read.

    Attributes:
        columns: Column to the records that have it; null is no value.
        keys: Key of messages to the messages that lost it.
    """

    columns: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)


Item = Document | Rejected
"""What a reader yields."""
