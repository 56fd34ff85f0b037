"""What every section of a configuration is made of: no unknown keys, sizes such as ``64K``, help from docstrings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nemo_prolong.units import parse_size

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
"""A positive count that may be written with K, M, B or T."""

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
