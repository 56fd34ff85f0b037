"""Names that look like numbers or truth values: Hydra would turn ``cluster.account=1e5`` into 100000.0.

The schema knows which keys are text. What is typed for them gets quotes before Hydra reads it, so it stays as it was
typed. null stays null. In YAML files a name such as 1e5 is written in quotes.
"""

from __future__ import annotations

import re
import typing
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nemo_prolong.config.commands import hydra_value
from nemo_prolong.config.keys import field_at, location_of
from nemo_prolong.config.schema import Section

_SIMPLE_LIST = re.compile(r"\[([^\[\](){}'\"\\$]*)\]")
"""A list whose entries are between its commas."""


def as_text(schema: type[Section], override: str) -> str:
    """Return an override with quotes around what is text for the schema and something else for Hydra.

    Args:
        schema: Of the whole configuration.
        override: As it was typed. One that Hydra cannot read stays as it is.

    >>> from nemo_prolong.config.schema import RunConfig
    >>> as_text(RunConfig, "cluster.account=1e5"), as_text(RunConfig, "seed=7")
    ('cluster.account="1e5"', 'seed=7')
    """
    key, equals, raw = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return override
    if not equals or parsed.is_delete() or parsed.is_sweep_override():
        return override
    return f"{key}={_quoted(_annotation(schema, parsed), parsed.value(), raw.strip())}"


def _annotation(schema: type[Section], override: Override) -> Any:
    """Return what the key of an override must be, or None where the schema has no such key."""
    field = field_at(schema, location_of(override.key_or_group)) if override.package is None else None
    return None if field is None else field.annotation


def _quoted(annotation: Any, value: Any, raw: str) -> str:
    if _takes(annotation, str) and _is_number(value):
        return hydra_value(raw)
    entries = _SIMPLE_LIST.fullmatch(raw)
    of_text = any(
        typing.get_origin(kind) is list and _takes(typing.get_args(kind)[0], str) for kind in _kinds(annotation)
    )
    if not of_text or not isinstance(value, list) or entries is None or not value:
        return raw
    pairs = zip(value, entries[1].split(","), strict=True)
    return f"[{','.join(hydra_value(part.strip()) if _is_number(entry) else part for entry, part in pairs)}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _takes(annotation: Any, kind: type) -> bool:
    return kind in _kinds(annotation)


def _kinds(annotation: Any) -> list[Any]:
    """Return the members of a union without their annotations, or the one kind that it is."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if isinstance(annotation, type) or typing.get_origin(annotation) in (list, dict, typing.Literal):
        return [annotation]
    return [kind for member in typing.get_args(annotation) for kind in _kinds(member)] or [annotation]
