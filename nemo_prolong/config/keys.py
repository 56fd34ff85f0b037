"""Look up keys of a schema: which exist, what they mean, and which one a misspelt key was meant to be."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence

from pydantic.fields import FieldInfo

from nemo_prolong.config.schema import Section
from nemo_prolong.errors import ConfigError

Location = tuple[str | int, ...]
"""Path of a value as pydantic reports it: ``("data", "mixture", 0, "path")``."""

MISSING = "???"
"""What stands for a value that must be given, in the words of OmegaConf."""


def dotted(location: Location) -> str:
    """Return a location as it is typed on the command line.

    >>> dotted(("data", "mixture", 0, "path"))
    'data.mixture[0].path'
    """
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def location_of(path: str) -> Location:
    """Return the location of a typed path.

    >>> location_of("data.mixture[0].path")
    ('data', 'mixture', 0, 'path')
    """
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", path))


def section_at(schema: type[Section], location: Location) -> type[Section] | None:
    """Return the section that lies at ``location``, or None where there is none."""
    section: type[Section] | None = schema
    is_name = False
    for part in location:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        if section is None or part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        # The next part of a path into a dict is a name that the user gave.
        is_name = typing.get_origin(annotation) is dict
        section = _section_of(annotation)
    return section


def field_at(schema: type[Section], location: Location) -> FieldInfo | None:
    """Return the field at ``location``; for an entry of a list, the field of the list."""
    names = [part for part in location if isinstance(part, str)]
    section = section_at(schema, tuple(names[:-1]))
    return section.model_fields.get(names[-1]) if section and names else None


def without_entries(schema: type[Section], location: Location) -> Location:
    """Return the list or dict that ``location`` lies in, or ``location`` where it lies in none.

    >>> from nemo_prolong.config.schema import RunConfig
    >>> without_entries(RunConfig, ("data", "mixture", 0, "path"))
    ('data', 'mixture')
    """
    for depth in range(1, len(location)):
        field = field_at(schema, location[:depth])
        if field is not None and _is_collection(field.annotation):
            return location[:depth]
    return location


def all_keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield every key of ``schema`` with its full path, sections before their keys."""
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        section = _section_of(field.annotation)
        if section is not None and not _is_collection(field.annotation):
            yield from all_keys(section, f"{path}.")


def nearest_key(schema: type[Section], path: str) -> str | None:
    """Return the key of ``schema`` that ``path`` most likely meant, or None when nothing is close.

    Only the last part is compared, so that a key in the wrong section, or in a misspelt one, is found too.
    """
    name = path.rpartition(".")[2]
    by_last_part = {key.rpartition(".")[2]: key for key in reversed(list(all_keys(schema)))}
    close = difflib.get_close_matches(name, by_last_part, n=1, cutoff=0.75)
    return by_last_part[close[0]] if close else _key_known_as(schema, name)


def _key_known_as(schema: type[Section], name: str) -> str | None:
    """Return the key whose help gives ``name`` in parentheses: ``TP``, or another library's name for it."""
    for key in all_keys(schema):
        field = field_at(schema, location_of(key))
        aliases = re.findall(r"\w+", " ".join(re.findall(r"\((.*?)\)", (field and field.description) or "")))
        if name.lower() in (alias.lower() for alias in aliases):
            return key
    return None


def unknown_key(schema: type[Section], location: Location, value: str | None = None) -> ConfigError:
    """Return the error for a key that is not there: in no section of that name, or in one that is null.

    Args:
        schema: The schema of the whole configuration.
        location: Where the key was set.
        value: What it was set to, as text; None leaves it out of the message.
    """
    path = dotted(location)
    parent = section_at(schema, location[:-1])
    place = dotted(location[:-1]) or "the configuration"
    if field_at(schema, location) is not None:
        # The schema has the key: what was composed has null where its section would be.
        whole = f"{place}={{{location[-1]}:{'VALUE' if value is None else value}}}"
        return ConfigError(
            path if value is None else f"{path}={value}", f"{place} is null here.", f"Set it whole: {whole}."
        )
    nearest = _nearest_in(schema, location)
    if nearest is not None:
        remedy = f"Did you mean {nearest}{'' if value is None else '=' + value}?"
    elif parent is not None:
        remedy = f"Keys of {place}: {', '.join(parent.model_fields)}."
    else:
        remedy = f"Top-level keys: {', '.join(schema.model_fields)}."
    return ConfigError(path if value is None else f"{path}={value}", f"no such key in {place}.", remedy)


def _nearest_in(schema: type[Section], location: Location) -> str | None:
    """Prefer a neighbour of the misspelt key, then any key of the schema."""
    parent = section_at(schema, location[:-1])
    if parent is not None:
        close = difflib.get_close_matches(str(location[-1]), parent.model_fields, n=1, cutoff=0.7)
        if close:
            return dotted((*location[:-1], close[0]))
    return nearest_key(schema, dotted(location))


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """Return the one of ``names`` that ``name`` most likely meant, or None when nothing is close."""
    close = difflib.get_close_matches(name, names, n=1)
    return close[0] if close else None


def _section_of(annotation: object) -> type[Section] | None:
    """Return the section inside ``X``, ``list[X]``, ``dict[str, X]``, ``X | None`` or None when there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (_section_of(argument) for argument in typing.get_args(annotation))
    return next((section for section in inner if section is not None), None)


def _is_collection(annotation: object) -> bool:
    """Return whether the annotation is a list or dict, or one of them or None."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_is_collection(argument) for argument in typing.get_args(annotation))
    return typing.get_origin(annotation) in (list, dict)
