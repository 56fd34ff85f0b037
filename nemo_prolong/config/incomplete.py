"""Load a configuration that lacks values, for ``--cfg``: what is given is as strict as ever.

Reading a value that is missing raises ``MissingValueError``, so a rule that needs it cannot be judged and is left out.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Any, TypeVar, cast

from omegaconf import DictConfig
from pydantic import create_model

from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.keys import Location, section_at, without_entries
from nemo_prolong.config.load import explain_all, read
from nemo_prolong.config.schema import Section
from nemo_prolong.config.schema.base import MissingValueError

T = TypeVar("T", bound=Section)


class _Incomplete(Section):
    """A section that may lack values."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise MissingValueError(name)
            return super().__getattr__(name)


def load_incomplete(cfg: DictConfig, schema: type[T]) -> T:
    """Return ``cfg`` as an instance of ``schema``, or of a subclass of it where values are missing.

    Args:
        cfg: A composed configuration; interpolations are resolved here.
        schema: The section it must be once it is complete.

    Raises:
        ConfigError: If a key is unknown, or a value that is given has the wrong type or breaks its own bounds.
    """
    document, missing, details = read(cfg, schema)
    raise_all(explain_all(schema, (detail for detail in details if detail["type"] != "missing")))
    missing += [detail["loc"] for detail in details]
    # An entry of a list or a dict cannot lack a value on its own: the whole list counts as missing.
    unset = {without_entries(schema, location) for location in missing}
    typed = _without(schema, unset).model_validate_json(document, strict=True)
    for location in unset:
        _forget(typed, location)
    return typed


def _without(schema: type[T], missing: Set[Location]) -> type[T]:
    """Return a subclass of ``schema`` that can be made without the values at ``missing``."""
    if not missing:
        return schema
    fields: dict[str, Any] = {}
    for name in {str(location[0]) for location in missing}:
        below = {location[1:] for location in missing if location[0] == name}
        section = section_at(schema, (name,))
        fields[name] = (Any, None) if () in below or section is None else (_without(section, below), ...)
    made = create_model(schema.__name__, __base__=(_Incomplete, schema), **fields)
    return cast(type[T], made)


def _forget(section: Section, location: Location) -> None:
    """Take the stand-in of a missing value away."""
    for name in location[:-1]:
        section = getattr(section, str(name))
    vars(section).pop(str(location[-1]), None)
