"""Turn a composed configuration into a typed section, strictly.

Unknown keys are refused wherever they are (``+model.new=1`` included), and so are values of another type and missing
values. All of them are reported at once, each with its path, its rule and a remedy. This takes milliseconds and needs
no torch.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nemo_prolong.config.commands import hydra_value
from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.keys import (
    MISSING,
    Location,
    dotted,
    field_at,
    location_of,
    nearest_key,
    nearest_name,
    section_at,
    unknown_key,
)
from nemo_prolong.config.schema import Section
from nemo_prolong.errors import ConfigError
from nemo_prolong.text import escaped

T = TypeVar("T", bound=Section)

_KINDS = {
    "int_type": ("must be a whole number", "N"),
    "int_from_float": ("must be a whole number", "N"),
    "float_type": ("must be a number", "X"),
    "finite_number": ("must be a finite number", "X"),
    "bool_type": ("must be true or false", "true|false"),
    "string_type": ("must be text", "TEXT"),
    "too_long": ("is too long", "TEXT"),
    "list_type": ("must be a list", "[...]"),
    "too_short": ("must not be empty", "[...]"),
    "model_type": ("must be a section", "{...}"),
    "model_attributes_type": ("must be a section", "{...}"),
    "dict_type": ("must be a section", "{...}"),
    "string_pattern_mismatch": ("does not have the right form", "TEXT"),
}
"""pydantic's error types: the rule in our words, and what stands for a right value."""

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def load(cfg: DictConfig, schema: type[T]) -> T:
    """Return ``cfg`` as an instance of ``schema``.

    Args:
        cfg: A composed configuration; interpolations are resolved here.
        schema: The section it must be: ``RunConfig``, ``PrepareConfig``, ``EvaluateConfig``, ...

    Raises:
        ConfigError: If a key is unknown or missing, a value has the wrong type or breaks its own bounds, or an
            interpolation cannot be resolved. All of them in one message, one line each.
    """
    document, unset, details = read(cfg, schema)
    raise_all([*(_must_be_set(schema, location) for location in unset), *explain_all(schema, details)])
    return schema.model_validate_json(document, strict=True)


def read(cfg: DictConfig, schema: type[Section]) -> tuple[str, list[Location], list[ErrorDetails]]:
    """Return the values that are given, where one is still ``???``, and what pydantic finds besides.

    Args:
        cfg: A composed configuration; interpolations are resolved here.
        schema: The section it must be.

    Returns:
        The values as JSON, the locations of ``???``, and pydantic's findings. JSON is the strict form that still reads
        an enum from its text. Keys that are not there are among the findings.

    Raises:
        ConfigError: If an interpolation cannot be resolved.
    """
    document = json.dumps(_without_missing(_resolved(cfg, schema)), default=str)
    unset = [location_of(key) for key in sorted(OmegaConf.missing_keys(cfg))]
    try:
        schema.model_validate_json(document, strict=True)
    except ValidationError as error:
        return document, unset, [detail for detail in error.errors(include_url=False) if detail["loc"] not in unset]
    return document, unset, []


def explain_all(schema: type[Section], details: Iterable[ErrorDetails]) -> list[ConfigError]:
    """Return pydantic's findings as errors in the words of this project."""
    return [_explain(schema, detail) for detail in details]


def format_value(value: Any) -> str:
    """Return a value as it would be typed on the command line; long lists and sections are shortened."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if any(ord(character) < 32 for character in text):
        # On one line, and as one would type it in a string.
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _resolved(cfg: DictConfig, schema: type[Section]) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise _explain_interpolation(cfg, schema, error) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _explain_interpolation(cfg: DictConfig, schema: type[Section], error: OmegaConfBaseException) -> ConfigError:
    """Return the error for ``key: ${other}`` that leads nowhere."""
    key = error.full_key or ""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in location_of(key):
        raw = raw[part]
    reason = str(error.msg or error).splitlines()[0]
    wanted = re.search(r"Interpolation key '(.+)' not found", reason)
    if isinstance(error, InterpolationKeyError) and wanted:
        nearest = nearest_key(schema, wanted[1])
        remedy = f"Did you mean ${{{nearest}}}?" if nearest else f"Write a value for {key}."
        return ConfigError(f"{key}={format_value(raw)}", f"refers to {wanted[1]}, which does not exist.", remedy)
    return ConfigError(
        f"{key}={format_value(raw)}",
        f"cannot be resolved: {reason.rstrip('.')}.",
        f"Write a value for {key}, or ${{KEY}} with a key of this configuration.",
    )


def _without_missing(values: Any) -> Any:
    """Drop keys that are still ``???``; they are reported on their own."""
    if isinstance(values, dict):
        return {key: _without_missing(value) for key, value in values.items() if value != MISSING}
    if isinstance(values, list):
        return [_without_missing(value) for value in values]
    return values


def _explain(schema: type[Section], detail: ErrorDetails) -> ConfigError:
    """Return one of pydantic's findings as an error in the words of this project."""
    location: Location = detail["loc"]
    path, value, kind = dotted(location), detail["input"], detail["type"]
    if kind == "extra_forbidden":
        return unknown_key(schema, location, None if isinstance(value, dict) else format_value(value))
    if kind == "missing":
        return _must_be_set(schema, location)
    what = f"{path}={format_value(value)}"
    if kind in ("enum", "literal_error"):
        names = re.findall(r"'(.+?)'", str(detail["ctx"]["expected"]))
        nearest = nearest_name(str(value), names) or names[0]
        return ConfigError(what, f"must be one of {', '.join(names)}.", _say(schema, location, nearest))
    if kind in _BOUNDS:
        return _explain_bound(schema, location, what, detail)
    if kind == "value_error":
        rule, _, hint = str(detail["ctx"]["error"]).partition("; ")
        rule = rule.removeprefix(f"{value!r} ") + (f" ({hint})" if hint else "")
        return ConfigError(what, f"{rule}.", _say(schema, location, _nearest(value)))
    rule, placeholder = _KINDS.get(kind, (detail["msg"], "VALUE"))
    section = section_at(schema, location)
    if kind == "string_type" and isinstance(value, bool | int | float):
        # What was typed is gone: 1e5 in a file is 100000.0 here.
        rule, placeholder = f"{rule}, and a name that looks like a number goes in quotes", '"TEXT"'
    elif placeholder == "TEXT" or (isinstance(value, str) and kind == "too_short"):
        placeholder = _right_text(schema, location, value)
    if section is not None and placeholder == "{...}":
        rule += f" with the keys {', '.join(section.model_fields)}"
    return ConfigError(what, f"{rule}.", _say(schema, location, placeholder))


def _must_be_set(schema: type[Section], location: Location) -> ConfigError:
    return ConfigError(f"{dotted(location)}=???", "must be set and has no default.", _say(schema, location, "VALUE"))


def _explain_bound(schema: type[Section], location: Location, what: str, detail: ErrorDetails) -> ConfigError:
    name, words = _BOUNDS[detail["type"]]
    limit = detail["ctx"][name]
    nearest = limit
    if name in ("gt", "lt"):
        whole = isinstance(limit, int) and isinstance(detail["input"], int | str)
        nearest = (limit + 1 if name == "gt" else limit - 1) if whole else _default(schema, location) or "X"
    return ConfigError(what, f"must be {words} {limit}.", _say(schema, location, nearest))


def _default(schema: type[Section], location: Location) -> Any:
    """Return the default of a key, or None where it has none."""
    field = field_at(schema, location)
    return None if field is None or field.is_required() else field.get_default(call_default_factory=True)


def _right_text(schema: type[Section], location: Location, value: Any) -> str:
    """Return a text that would do: the default, null where that is allowed, or a stand-in."""
    field, default = field_at(schema, location), _default(schema, location)
    if isinstance(default, str) and default != value:
        return hydra_value(default)
    nullable = field is not None and type(None) in typing.get_args(field.annotation)
    return "TEXT" if value or not nullable else "null"


def _nearest(value: Any) -> str:
    """Return a value that breaks no rule of its own: a list without what is repeated, text on one line, a size."""
    if isinstance(value, list):
        return hydra_value(list(dict.fromkeys(value)))
    if isinstance(value, str) and escaped(value) != " ".join(value.split()):
        return hydra_value("-".join(re.findall(r"[^\W_][\w.+/-]*", value)) or "TEXT")
    return _nearest_size(value)


def _nearest_size(value: Any) -> str:
    """Return the size a text starts with (``64k tokens``: 64K), or a general example."""
    match = re.match(r"\s*(\d+)\s*([kmbt]?)", str(value), re.IGNORECASE)
    return f"{match[1]}{match[2].upper()}" if match else "64K"


def _say(schema: type[Section], location: Location, value: object) -> str:
    """Return the remedy that sets a key: ``Set path=value (what the key means)`` and a full stop."""
    return f"Set {dotted(location)}={value}{meaning_of(schema, location)}."


def meaning_of(schema: type[Section], location: Location) -> str:
    """Return the first sentence of a key's help as ``" (text)"``, or nothing when it has none."""
    field = field_at(schema, location)
    if field is None or not field.description:
        return ""
    sentence = " ".join(field.description.replace("`", "").split()).partition(". ")[0].rstrip(".")
    if sentence[1:2].islower():
        sentence = sentence[0].lower() + sentence[1:]
    return f" ({sentence})"
