"""What every section of a configuration is made of: no unknown keys, sizes such as ``64K``, help from docstrings.

The types here carry the bounds that several keys share. A bound keeps out what could only be a mistake. Each says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from nemo_prolong.text import escaped
from nemo_prolong.units import parse_size

T = TypeVar("T")

MAX_ROW_TOKENS = 2**30
"""Longest row. Document boundaries are int32, and padding must not carry them beyond."""


def _text_of_number(value: Any) -> Any:
    """Return a whole number as text: an account ``12345`` is a name. What is no number stays as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _without_controls(value: str) -> str:
    """Refuse characters that end a line or control a terminal: they break logs, job files and lists of files."""
    if escaped(value) != value or "\n" in value or "\t" in value:
        raise ValueError(f"{value!r} has characters that end a line or control a terminal; use visible ones")
    return value


def distinct(values: Sequence[T]) -> Sequence[T]:
    """Refuse a list that names something more than once."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{values!r} names {value!r} more than once; name each once")
    return values


Text = Annotated[str, BeforeValidator(_text_of_number), AfterValidator(_without_controls), Field(max_length=4096)]
"""Text on one line. It may be empty where that means something. 4096 bytes are the longest path of Linux."""

ShownText = Annotated[str, BeforeValidator(_text_of_number), Field(max_length=4096)]
"""Text that is only shown, and escaped there. Runs that were recorded with any characters in it can be read."""

Name = Annotated[Text, Field(min_length=1)]
"""A name, path or address that is not empty. An empty path would be the directory of the command."""

Names = Annotated[list[Name], AfterValidator(distinct)]
"""Names, each of them once: a second mention would count, score or draw the same thing twice."""

Token = Annotated[str, BeforeValidator(_text_of_number), Field(min_length=1, max_length=256)]
"""A token of a tokenizer, which may be any characters; null stands for none."""

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=2**60)]
"""A positive count that may be written with K, M, B or T. 2**60 bytes or tokens are more than anyone has."""

RowTokens = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=MAX_ROW_TOKENS)]
"""Tokens of a row or a document, see ``MAX_ROW_TOKENS``."""

Count = Annotated[int, Field(gt=0, le=10**9)]
"""A positive number of steps, rows or files. A billion of them are beyond any run."""

CountOrNone = Annotated[int, Field(ge=0, le=10**9)]
"""As ``Count``; 0 turns off what is counted."""

Parts = Annotated[int, Field(gt=0, le=2**20)]
"""Ranks, machines, layers, heads or channels. A million of them are beyond any cluster and any model."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seed of a random generator. torch takes 64 bits with a sign."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share that leaves something over."""


class MissingValueError(LookupError):
    """A value was read that the configuration does not have yet; see ``config.incomplete``."""


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, attribute docstrings are the help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )
