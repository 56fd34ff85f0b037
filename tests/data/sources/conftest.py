"""Reading a whole source at once, for tests that look at what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.config.schema.prepare import SourceConfig
from nemo_prolong.data.sources import plan_units, read_unit
from nemo_prolong.data.sources.base import Document, Rejected

AWKWARD = [
    "plain",
    "caf\u00e9 \u4e2d\u6587 \U0001f600 e\u0301",
    'quotes " and \\ and \t tab',
    "line one\nline two\r\nline three\u2028not a line\x85nor this",
    " \u00a0 leading and trailing \ufeff",
    "<|begin_of_text|> is text here",
    "\x00 a zero byte, \x1f a control character",
]
"""Texts that formats get wrong."""


@dataclass
class Everything:
    """What a source gave, in order.

    Attributes:
        documents: The documents.
        texts: Their texts, joined.
        rejected: What was left out.
        units: Units it was read in.
    """

    documents: list[Document] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    units: int = 0


Read = Callable[..., Everything]


@pytest.fixture(scope="session")
def read() -> Read:
    """Return a function that reads the source of some settings, and checks that it can be planned twice alike."""

    def read_source(
        path: Path | str, unit_bytes: int = 2**20, cache: Path | None = None, **settings: Any
    ) -> Everything:
        source = SourceConfig(domain="domain", path=str(path), **settings)
        units = plan_units(source, cache, unit_bytes)
        assert units == plan_units(source, cache, unit_bytes)
        everything = Everything(units=len(units))
        for unit in units:
            for item in read_unit(source, unit, cache):
                if isinstance(item, Rejected):
                    everything.rejected.append(item)
                    continue
                everything.documents.append(item)
                everything.texts.append("".join(item.pieces or ()))
        return everything

    return read_source


@pytest.fixture(scope="session")
def awkward() -> list[str]:
    """Return texts that formats get wrong."""
    return AWKWARD
