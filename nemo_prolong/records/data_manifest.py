"""``manifest.json`` and ``samples.json`` of a data directory, as far as its card needs them.

Both hold text from the data. What would hide or garble a page (control characters, marks that turn the direction of
writing, half surrogates) becomes a visible character on reading, one for one, so that character ranges stay right.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemo_prolong.errors import DataError

MANIFEST = "manifest.json"
SAMPLES = "samples.json"

_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_HIDDEN = (*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
_VISIBLE = _CONTROLS | dict.fromkeys(_HIDDEN, 0xFFFD)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Histogram(_Record):
    """Documents and their tokens by length: entry k is for ``2^k <= tokens < 2^(k+1)``."""

    documents: list[int] = []
    tokens: list[int] = []

    @property
    def buckets(self) -> list[int]:
        """Entries that hold a document, ascending."""
        return [bucket for bucket, count in enumerate(self.documents) if count]


class SourceFile(_Record):
    """One file of a source."""

    name: str
    bytes: int
    sha256: str


class Rejection(_Record):
    """Documents left out for one reason."""

    documents: int
    bytes: int


class RejectedExample(_Record):
    """One document that was left out."""

    key: str
    reason: str
    bytes: int
    detail: str


class Source(_Record):
    """What one source gave."""

    domain: str
    format: str
    path: str
    split: str
    files: list[SourceFile] = []
    documents: int
    tokens: int
    input_bytes: int
    rejected: dict[str, Rejection] = {}
    rejected_examples: list[RejectedExample] = []


class DomainSplit(_Record):
    """Training or validation documents of a domain."""

    documents: int
    tokens: int
    length_histogram: Histogram = Histogram()


class RowSet(_Record):
    """One directory of packed rows; ``documents`` counts pieces, the input counts whole documents."""

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
    sum_squared_lengths: int
    length_histogram: Histogram = Histogram()
    sha256: str

    @property
    def attention_share(self) -> float:
        """Attention cost against rows of one document each, as the sum of squared document lengths over rows * L^2."""
        return self.sum_squared_lengths / (self.rows * self.seq_length**2)

    @property
    def tokens_per_row(self) -> float:
        """Real tokens of a row on average."""
        return self.tokens / self.rows


class StageRowSet(_Record):
    """What a stage takes of one row set."""

    proportion: float
    rows_taken: int
    epochs: float


class Stage(_Record):
    """A stage that the rows are for."""

    tokens: int
    row_sets: dict[str, StageRowSet]


class Manifest(_Record):
    """A data directory."""

    format: Literal[2]
    command: str = ""
    seed: int
    config: dict[str, Any] = {}
    tokenizer: str
    tokenizer_sha256: str
    tokenizer_library: str
    vocab_size: int
    bos_token: str | None = None
    eos_token: str | None = None
    sources: list[Source]
    domains: dict[str, dict[str, DomainSplit]]
    row_sets: dict[str, RowSet] = Field(min_length=1)
    stages: dict[str, Stage] = {}
    python: str = ""
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_stages(self) -> Manifest:
        for name, stage in self.stages.items():
            unknown = sorted(stage.row_sets.keys() - self.row_sets.keys())
            if unknown:
                raise ValueError(f"stage {name} takes rows of {', '.join(unknown)}, which row_sets does not hold")
        return self

    @cached_property
    def splits(self) -> list[tuple[str, str, DomainSplit]]:
        """(domain, split, facts) of everything that has documents."""
        return [(domain, split, facts) for domain, splits in self.domains.items() for split, facts in splits.items()]


class Boundary(_Record):
    """Text on either side of a document boundary, and the character ranges of special tokens in it."""

    position: int
    before: str
    after: str
    before_special: list[tuple[int, int]] = []
    after_special: list[tuple[int, int]] = []


class MaskedPart(_Record):
    """A stretch of a row that is trained on, or is not."""

    text: str
    target: bool
    special: bool = False


class Sample(_Record):
    """One row, in part decoded."""

    row: int
    domain: str
    tokens: int = Field(gt=0)
    spans: list[tuple[int, int]]
    boundaries: list[Boundary]
    masked_text: list[MaskedPart] | None = None


class Samples(_Record):
    """Rows of every row set."""

    row_sets: dict[str, list[Sample]]


Document = TypeVar("Document", Manifest, Samples)


def read(path: Path, kind: type[Document]) -> Document:
    """Return the contents of ``manifest.json`` or ``samples.json``.

    Raises:
        DataError: If the file is missing or does not say what a card needs.
    """
    try:
        return kind.model_validate(_cleaned(json.loads(path.read_text("utf-8"))))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: {where}", f"no data card can be made of it: {first['msg']}.", "Prepare the data again."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}", f"cannot be read ({error}).", "Prepare the data again.") from error


def _cleaned(value: Any) -> Any:
    """Return parsed JSON with every string, keys included, made visible."""
    if isinstance(value, str):
        return value.translate(_VISIBLE)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    return value
