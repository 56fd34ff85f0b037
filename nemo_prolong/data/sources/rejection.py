"""A document that cannot be used: an error, or a counted drop where the user asked for it."""

from __future__ import annotations

from typing import Any

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources.base import Rejected
from nemo_prolong.errors import DataError

_NAMED_FIELDS = 12
"""Fields that an error lists at most."""
_KINDS = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "text",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


def listed(names: Any) -> str:
    """Return names for a message, the first few of many."""
    names = [printable(str(name)) for name in names]
    shown = ", ".join(names[:_NAMED_FIELDS]) or "none"
    return shown if len(names) <= _NAMED_FIELDS else f"{shown} and {len(names) - _NAMED_FIELDS} more"


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of a message."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def printable(name: str) -> str:
    """Return a name from the data with half surrogates, which no file or terminal takes, written out."""
    return name.encode("utf-8", "backslashreplace").decode()


class BadDocument(Exception):
    """What is wrong with one document; caught where its place is known.

    Args:
        reason: As in ``Rejected``.
        rule: What is wrong, one sentence about the document.
        remedy: What to do about it.
    """

    def __init__(self, reason: str, rule: str, remedy: str) -> None:
        self.reason = reason
        self.rule = rule
        self.remedy = remedy
        super().__init__(rule)


def is_dropped(source: SourceConfig) -> bool:
    """Return whether bad documents of ``source`` are counted and left out."""
    return source.on_bad_document == "drop"


def dropped(bad: BadDocument, key: str, num_bytes: int) -> Rejected:
    """Return the record of a document that is left out."""
    return Rejected(key, bad.reason, num_bytes, bad.rule)


def refused(bad: BadDocument, where: str) -> DataError:
    """Return the error for a bad document.

    Args:
        bad: What is wrong with it.
        where: File and place in it.
    """
    return DataError(where, bad.rule, f"{bad.remedy} Or leave such documents out: on_bad_document=drop.")


def drop_or_refuse(source: SourceConfig, bad: BadDocument, key: str, where: str, num_bytes: int) -> Rejected:
    """Return the record of a document that is left out.

    Raises:
        DataError: Where the user did not ask for that.
    """
    if not is_dropped(source):
        raise refused(bad, where) from bad
    return dropped(bad, key, num_bytes)
