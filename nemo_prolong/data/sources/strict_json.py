"""JSON as its standard has it, where Python's parser takes more: one value a key, and no NaN where values are read."""

from __future__ import annotations

import json
import math
from typing import Any

from nemo_prolong.data.sources.rejection import BadDocument

_MAX_DEPTH = 100
"""Objects and lists in one another; templates are rendered by recursion."""


class DuplicateKeyError(ValueError):
    """An object has a key twice, and a parser would have to choose."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"an object has the key {twice!a} more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str) -> Any:
    """Return the value of a text.

    Raises:
        json.JSONDecodeError: If it is no JSON.
        DuplicateKeyError: If an object has a key twice.
        ValueError: If a number has too many digits.
        RecursionError: If it is nested too deeply.
    """
    return _DECODER.decode(text)


def parse_json_text(text: str, what: str) -> Any:
    """Return the value of JSON that stands as text within a record, as data sets store tools.

    Args:
        text: The JSON.
        what: What it is, for the message.

    Raises:
        BadDocument: If it is no JSON.
    """
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        remedy = "Write it as JSON, with double quotes, or as objects."
        raise BadDocument("invalid_json", f"has text in {what} that is no JSON: {error}.", remedy) from error


def check_encodable(text: str) -> None:
    r"""Check that a text has no lone surrogates, which JSON can write (``"\ud800"``) and UTF-8 cannot.

    Raises:
        BadDocument: If it has.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"has half of a surrogate pair, {text[error.start]!a}, as character {error.start} of a text."
        raise BadDocument("invalid_utf8", rule, "Write whole characters.") from error


def check_json_value(value: Any, what: str, depth: int = 0) -> None:
    """Check that a value is one of JSON all the way down, keys included: a template writes it into the text as JSON.

    Args:
        value: What a template is to see.
        what: What it is, for the message.
        depth: Objects and lists around it.

    Raises:
        BadDocument: If it holds NaN, infinity, a time or whatever else JSON has not, or nests too deeply.
    """
    if depth > _MAX_DEPTH:
        rule = f"nests more than {_MAX_DEPTH} objects and lists in {what}."
        raise BadDocument("wrong_type", rule, "Write it with less nesting.")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise _not_json(f"a {type(key).__name__} as a key", what, "Write keys as text.")
            check_encodable(key)
            check_json_value(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_json_value(item, what, depth + 1)
    else:
        _check_scalar(value, what)


def _check_scalar(value: Any, what: str) -> None:
    if isinstance(value, str):
        check_encodable(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _not_json(str(value), what, "Write null, or leave the key out.")
    elif value is not None and not isinstance(value, int):
        raise _not_json(f"a {type(value).__name__}", what, "Write it as text or as a number.")


def _not_json(found: str, what: str, remedy: str) -> BadDocument:
    return BadDocument("wrong_type", f"has {found} in {what}, which JSON has not.", remedy)
