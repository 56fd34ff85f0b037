"""The defaults of the schema as configuration files that Hydra can find.

A default is written once, in ``config.schema``. The files under ``conf/`` take all of them with one line, such as
``train_defaults`` in the defaults list of ``conf/train.yaml``. What they set after that line wins.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from nemo_prolong.config.keys import MISSING
from nemo_prolong.config.schema import (
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    MlflowConfig,
    ReportConfig,
    RunConfig,
    Section,
    WandbConfig,
)
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.units import exact_tokens, parse_size

ENTRY_POINTS: dict[str, type[Section]] = {
    "train": RunConfig,
    "prepare_data": PrepareConfig,
    "recipe": RecipeConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
"""Files of ``conf/`` that a script starts from, and what each of them must be."""

_PARTS: dict[str, type[Section]] = {"data": DataConfig, "wandb": WandbConfig, "mlflow": MlflowConfig}
"""Sections that are null or have no name of their own in an entry point, so a file adds them."""


def defaults_of(schema: type[Section]) -> dict[str, Any]:
    """Return every key of a section with its default, in plain types; ``???`` where a value must be given.

    >>> defaults_of(WandbConfig)
    {'project': 'nemo_prolong', 'entity': None, 'mode': 'online'}
    """
    values: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        annotation, default = field.annotation, field.get_default(call_default_factory=True)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            values[name] = defaults_of(annotation)
        elif field.is_required():
            values[name] = MISSING
        else:
            values[name] = _as_typed(default, is_size=_is_size(field))
    return values


def _is_size(field: FieldInfo) -> bool:
    return any(isinstance(rule, BeforeValidator) and rule.func is parse_size for rule in field.metadata)


def _as_typed(default: Any, is_size: bool) -> Any:
    """Return a default as one would type it: the text of an enum, ``64K`` for a size."""
    if isinstance(default, Enum):
        return default.value
    return exact_tokens(default) if is_size and default is not None else default


def register_defaults() -> None:
    """Let Hydra find ``NAME_defaults`` for every entry point and for every section that a file adds."""
    for name, schema in {**ENTRY_POINTS, **_PARTS}.items():
        ConfigStore.instance().store(f"{name}_defaults", defaults_of(schema))
