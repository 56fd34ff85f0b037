"""A default is written in the schema only: no file of ``conf/`` repeats it, and no entry point replaces it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.defaults import ENTRY_POINTS, defaults_of
from nemo_prolong.config.experiments import declared_script
from nemo_prolong.config.keys import MISSING
from nemo_prolong.config.schema import ExportConfig, RunConfig, Section
from nemo_prolong.units import parse_size

FILES = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if path.relative_to(CONFIG_DIR).parts[0] != "hydra")


def name_of(path: Path) -> str:
    return path.relative_to(CONFIG_DIR).as_posix()


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a list is one value, and so is an empty section."""
    if not isinstance(values, dict) or not values:
        yield prefix, values
        return
    for key, value in values.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def section_of_file(path: Path) -> str:
    """Return where Hydra puts what is in a file: nowhere in particular, or below the name of its group."""
    text, group = path.read_text(), path.relative_to(CONFIG_DIR).parts[0]
    return "" if path.parent == CONFIG_DIR or "# @package _global_" in text else f"{group}."


def schema_of_file(path: Path) -> type[Section]:
    group = path.relative_to(CONFIG_DIR).parts[0]
    if path.parent == CONFIG_DIR:
        return ENTRY_POINTS[path.stem]
    if group == "exp":
        return ENTRY_POINTS[declared_script(path)]
    return ExportConfig if group == "export" else RunConfig


def set_in(path: Path) -> dict[str, Any]:
    """Return the keys that a file sets, with their full names."""
    values = {key: value for key, value in (yaml.safe_load(path.read_text()) or {}).items() if key != "defaults"}
    return {f"{section_of_file(path)}{key}": value for key, value in leaves(values)} if values else {}


def defaults_in_schema(path: Path) -> dict[str, Any]:
    return {key: value for key, value in leaves(defaults_of(schema_of_file(path))) if value != MISSING}


def same(first: Any, second: Any) -> bool:
    """Return whether two values mean the same to the schema: ``64K`` is 65536 and 0 is 0.0, but true is not 1."""
    try:
        return parse_size(first) == parse_size(second)
    except ValueError:
        return isinstance(first, bool) is isinstance(second, bool) and first == second


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_repeats_a_default_of_the_schema(path):
    defaults = defaults_in_schema(path)
    repeated = {key: value for key, value in set_in(path).items() if key in defaults and same(value, defaults[key])}
    assert repeated == {}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_an_entry_point_sets_only_keys_that_have_no_default(name):
    path = CONFIG_DIR / f"{name}.yaml"
    assert set_in(path).keys() & defaults_in_schema(path).keys() == set()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_an_entry_point_takes_the_defaults_of_its_schema_first(name):
    assert yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())["defaults"][0] == f"{name}_defaults"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_key_that_a_file_sets_is_one_of_the_schema(path):
    known = dict(leaves(defaults_of(schema_of_file(path))))
    # Below a section that is null or a dict by default, the loader checks the keys.
    open_sections = tuple(f"{key}." for key, value in known.items() if value is None or value == {})
    assert [key for key in set_in(path) if key not in known and not key.startswith(open_sections)] == []


def test_the_comparison_sees_a_repeated_default_in_each_way_of_writing_it():
    assert same("32K", 32768) and same(64, 64) and same(0, 0.0) and same(None, None) and same([], [])
    assert not same(True, 1) and not same(0, False) and not same("bf16", "fp32") and not same(None, 0)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_section_that_is_a_default_holds_its_own_defaults(name):
    def sections(schema: type[Section]) -> Iterator[Section]:
        for field in schema.model_fields.values():
            if isinstance(field.default, Section):
                yield field.default
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from sections(field.annotation)

    assert [section for section in sections(ENTRY_POINTS[name]) if section != type(section)()] == []
