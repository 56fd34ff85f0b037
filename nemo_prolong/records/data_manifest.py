"""``manifest.json`` and ``samples.json`` of a data directory, for those who write them and those who read them.

Fields are written in the order in which they stand here. Where a field has a default, the card can be made of a
manifest without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemo_prolong.config.addresses import is_address
from nemo_prolong.errors import DataError
from nemo_prolong.files import write_json_atomically
from nemo_prolong.text import counted, pictured

MANIFEST = "manifest.json"
SAMPLES = "samples.json"

MAX_DROPPED_SHARE = 0.5
"""Share of its tokens that a row set may drop before its reader is told."""
MAX_CUT_TARGET_SHARE = 0.25
"""Share of their targets that the documents in rows may have lost before their reader is told."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Document(_Record):
    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        # Not in JSON mode: a path of a source may hold half surrogates, which pydantic refuses and JSON escapes.
        write_json_atomically(path, self.model_dump())


class LengthHistogram(_Record):
    """Documents and their tokens by length: entry k is for ``2^k <= tokens < 2^(k+1)``."""

    documents: list[int] = []
    tokens: list[int] = []

    @property
    def buckets(self) -> list[int]:
        """Entries that hold a document, ascending."""
        return [bucket for bucket, count in enumerate(self.documents) if count]


class FileFacts(_Record):
    """One file of a source."""

    name: str
    bytes: int
    sha256: str


class Rejection(_Record):
    """Documents left out for one reason."""

    documents: int
    bytes: int

    def __add__(self, other: Rejection) -> Rejection:
        return Rejection(documents=self.documents + other.documents, bytes=self.bytes + other.bytes)


class RejectedExample(_Record):
    """One document that was left out."""

    key: str
    reason: str
    bytes: int
    detail: str


class SourceFacts(_Record):
    """What one source gave.

    ``unread_columns`` counts the records that have a value in a column that was not read, and ``columns_to_check`` are
    those of them whose names say that they change what is learned. ``dropped_keys`` counts messages that lost a key.
    """

    domain: str
    format: str
    path: str
    split: str
    files: list[FileFacts] = []
    input_bytes: int
    documents: int
    tokens: int
    rejected: dict[str, Rejection] = {}
    rejected_examples: list[RejectedExample] = []
    unread_columns: dict[str, int] = {}
    columns_to_check: list[str] = []
    dropped_keys: dict[str, int] = {}


class DomainSplit(_Record):
    """Training or validation documents of a domain."""

    documents: int
    tokens: int
    length_histogram: LengthHistogram = LengthHistogram()


class ShardFacts(_Record):
    """One file of a row set."""

    bytes: int
    sha256: str


class RowSetFacts(_Record):
    """One directory of packed rows; ``documents`` counts pieces, the input counts whole documents.

    Target tokens are those with a loss. They are None where rows have no masks, because all tokens have one there but
    the first of each piece, and in manifests of versions that did not count them.

    Attributes:
        target_tokens: In rows.
        input_target_tokens: In the documents that went in.
        cut_documents: Documents in rows that lost target tokens.
        cut_target_tokens: What these lost.
    """

    domain: str
    split: str
    packing: str
    seq_length: int = Field(gt=0)
    document_length: int | None = None
    rows: int = Field(gt=0)
    documents: int
    tokens: int = Field(gt=0)
    fill: float
    input_documents: int
    input_tokens: int
    dropped_tokens: dict[str, int] = {}
    dropped_documents: dict[str, int] = {}
    target_tokens: int | None = None
    input_target_tokens: int | None = None
    cut_documents: int | None = None
    cut_target_tokens: int | None = None
    sum_squared_lengths: int
    length_histogram: LengthHistogram = LengthHistogram()
    sha256: str
    shards: dict[str, ShardFacts] = {}

    @property
    def attention_share(self) -> float:
        """Attention cost against rows of one document each, as the sum of squared document lengths over rows * L^2."""
        return self.sum_squared_lengths / (self.rows * self.seq_length**2)

    @property
    def tokens_per_row(self) -> float:
        """Real tokens of a row on average."""
        return self.tokens / self.rows

    @property
    def target_share(self) -> float | None:
        """Target tokens over the tokens in rows; None where they are not counted."""
        return None if self.target_tokens is None else self.target_tokens / self.tokens

    @property
    def documents_without_target(self) -> int:
        """Documents left out because packing leaves them no target."""
        return self.dropped_documents.get("no_target", 0)

    @property
    def dropped_share(self) -> float:
        """Tokens in no row over those that went in. What is beyond ``max_rows`` was not asked for and is left aside."""
        beyond = self.dropped_tokens.get("max_rows", 0)
        return (sum(self.dropped_tokens.values()) - beyond) / max(self.input_tokens - beyond, 1)


def losses(facts: RowSetFacts) -> list[str]:
    """Return what packing has lost of a row set's documents, a sentence each, where someone should look at it."""
    found = []
    if facts.documents_without_target:
        count = f"{facts.documents_without_target:,} of {counted(facts.input_documents, 'document')}"
        found.append(f"packing leaves {count} no target token, so they are left out. Longer rows keep them.")
    cut, kept = facts.cut_target_tokens or 0, facts.target_tokens or 0
    if cut > MAX_CUT_TARGET_SHARE * (cut + kept):
        words = f"the ends of rows cut off {cut:,} target tokens of documents that are in rows, and {kept:,} are left"
        found.append(f"{words}. Longer rows cut fewer.")
    if facts.dropped_share > MAX_DROPPED_SHARE:
        dropped = {reason: count for reason, count in facts.dropped_tokens.items() if reason != "max_rows"}
        worst = max(dropped, key=dropped.__getitem__)
        found.append(f"{facts.dropped_share:.0%} of the tokens are in no row, most of them because of {worst}.")
    return found


class StageRowSet(_Record):
    """What a stage takes of one row set."""

    proportion: float
    rows_taken: int
    epochs: float


class StageFacts(_Record):
    """A stage that the rows are for."""

    tokens: int
    row_sets: dict[str, StageRowSet]


class ChatFormat(_Record):
    """How the conversations of a data directory were written, for those who serve a model that was trained on them.

    ``template`` is ``tokenizer.chat_template`` of the configuration, None for the built-in one. ``end_of_turn`` are the
    tokens that the template ends what an assistant says with, that of a last answer first. Generation ends at each of
    them. ``date`` is what the template was given as today's, None where it asks for none.
    """

    template: str | None
    template_sha256: str
    end_of_turn: list[str]
    end_of_turn_ids: list[int]
    date: str | None = None


class DataManifest(_Document):
    """A data directory: what went in, what came out, what was dropped and why.

    ``fingerprint`` is of everything that decides the result. ``tokenizer_translated`` says what is written otherwise in
    the copy of the tokenizer than it was, so that transformers 4 and 5 can both load it. ``vocab_size`` is the smallest
    ``model.vocab_size`` that the tokenizer can be exported with.
    """

    format: Literal[2]
    fingerprint: str = ""
    command: str = ""
    config: dict[str, Any] = {}
    seed: int
    tokenizer: str
    tokenizer_sha256: str
    tokenizer_library: str
    tokenizer_translated: list[str] = []
    vocab_size: int
    bos_token: str | None = None
    eos_token: str | None = None
    chat: ChatFormat | None = None
    sources: list[SourceFacts]
    domains: dict[str, dict[str, DomainSplit]]
    row_sets: dict[str, RowSetFacts] = Field(min_length=1)
    stages: dict[str, StageFacts] = {}
    python: str = ""
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_stages(self) -> DataManifest:
        for name, stage in self.stages.items():
            unknown = sorted(stage.row_sets.keys() - self.row_sets.keys())
            if unknown:
                raise ValueError(f"stage {name} takes rows of {', '.join(unknown)}, which row_sets does not hold")
        return self

    @cached_property
    def splits(self) -> list[tuple[str, str, DomainSplit]]:
        """(domain, split, facts) of everything that has documents."""
        return [(domain, split, facts) for domain, splits in self.domains.items() for split, facts in splits.items()]


class SampleBoundary(_Record):
    """Text on either side of a document boundary, and the character ranges of special tokens in it."""

    position: int
    before: str
    after: str
    before_special: list[tuple[int, int]] = []
    after_special: list[tuple[int, int]] = []


class MaskedPart(_Record):
    """A stretch of a row that is trained on, or is not."""

    text: str
    special: bool = False
    target: bool


class Sample(_Record):
    """One row, in part decoded."""

    row: int
    domain: str
    tokens: int = Field(gt=0)
    spans: list[tuple[int, int]]
    boundaries: list[SampleBoundary]
    masked_text: list[MaskedPart] | None = None


class Samples(_Document):
    """Rows of every row set."""

    row_sets: dict[str, list[Sample]]


AnyDocument = TypeVar("AnyDocument", DataManifest, Samples)


def read_for_card(path: Path, kind: type[AnyDocument]) -> AnyDocument:
    """Return the contents of ``manifest.json`` or ``samples.json``, with every hidden character made visible.

    Both hold text from the data. Each character that would hide or garble a page becomes one visible character, so that
    character ranges stay right.

    Raises:
        DataError: If the file is missing or does not say what a card needs.
    """
    try:
        return kind.model_validate(_pictured(json.loads(path.read_text("utf-8"))))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: {where}", f"no data card can be made of it: {first['msg']}.", "Prepare the data again."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}", f"cannot be read ({error}).", "Prepare the data again.") from error


def _pictured(value: Any) -> Any:
    """Return parsed JSON with every string, keys included, made visible."""
    if isinstance(value, str):
        return pictured(value)
    if isinstance(value, list):
        return [_pictured(item) for item in value]
    if isinstance(value, dict):
        return {_pictured(key): _pictured(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class DataManifestFile:
    """``manifest.json`` of a data root as training sees it, read once.

    Attributes:
        where: Path or address of the file; two with one content are equal wherever they lie.
        content: Its bytes; None where there is none, as in the directories that ProLong published.
    """

    where: str = field(compare=False)
    content: bytes | None

    @classmethod
    def read(cls, root: str, read_bytes: Callable[[str], bytes]) -> DataManifestFile:
        """Return the file of a data root.

        Args:
            root: Directory or address.
            read_bytes: Returns the content of an address, or raises DataError if there is none.
        """
        if is_address(root):
            where = f"{root.rstrip('/')}/{MANIFEST}"
            try:
                return cls(where, read_bytes(where))
            except DataError:
                return cls(where, None)
        path = Path(root) / MANIFEST
        return cls(str(path), path.read_bytes() if path.is_file() else None)

    @property
    def sha256(self) -> str | None:
        """Hash of the file, None where there is none."""
        return None if self.content is None else hashlib.sha256(self.content).hexdigest()

    @property
    def tokenizer_sha256(self) -> str | None:
        """Hash of the tokenizer that the rows were made with, None where nothing says which that was.

        Raises:
            DataError: If the file is no JSON object.
        """
        sha256 = self._values.get("tokenizer_sha256")
        return None if sha256 is None else str(sha256)

    @property
    def eos_token(self) -> str | None:
        """The token that ends a document of the rows, None where there is none or nothing says which.

        Raises:
            DataError: If the file is no JSON object.
        """
        token = self._values.get("eos_token")
        return None if token is None else str(token)

    @property
    def chat(self) -> ChatFormat | None:
        """How conversations of the rows were written, None where there are none or nothing says how.

        Raises:
            DataError: If the file is no JSON object, or what it says of them cannot be read.
        """
        values = self._values.get("chat")
        try:
            return None if values is None else ChatFormat.model_validate(values)
        except ValidationError as error:
            rule = f"its entry chat cannot be read: {error.errors()[0]['msg']}."
            raise DataError(self.where, rule, "Copy or prepare the data again.") from error

    def target_tokens(self, path: str) -> int | None:
        """Return the tokens with a loss of a row set, None where nothing counts them.

        Raises:
            DataError: If the file is no JSON object.
        """
        row_sets = self._values.get("row_sets")
        entry = row_sets.get(path) if isinstance(row_sets, dict) else None
        targets = entry.get("target_tokens") if isinstance(entry, dict) else None
        return targets if isinstance(targets, int) else None

    @cached_property
    def _values(self) -> dict[str, Any]:
        try:
            found = json.loads(self.content or b"{}")
        except ValueError as error:
            raise DataError(self.where, f"is no JSON ({error}).", "Copy or prepare the data again.") from error
        if not isinstance(found, dict):
            raise DataError(self.where, "is no JSON object.", "Copy or prepare the data again.")
        return found
