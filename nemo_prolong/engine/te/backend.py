"""Whether Transformer Engine is here, found without importing it."""

from __future__ import annotations

import importlib.metadata


def installed_version() -> str | None:
    """Return the version of Transformer Engine in this environment; None where there is none."""
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
