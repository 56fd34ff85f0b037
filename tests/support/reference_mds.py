"""mosaicml-streaming, imported without torchvision: it needs two names of it, and uses neither for token data."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def _stand_in(name: str, *classes: str) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for attribute in classes:
        setattr(module, attribute, type(attribute, (), {}))
    sys.modules[name] = module


_stand_in("torchvision")
_stand_in("torchvision.datasets", "VisionDataset")
_stand_in("torchvision.transforms")
_stand_in("torchvision.transforms.functional", "to_tensor")

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.util import merge_index  # noqa: E402

__all__ = ["merge_index", "reference_rows", "reference_write"]


def reference_write(directory: Path, rows: Iterable[dict[str, Any]], columns: dict[str, str], **options: Any) -> Path:
    """Write rows with its writer; return the directory."""
    with MDSWriter(out=str(directory), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return directory


def reference_rows(directory: Path, order: Iterable[int], **options: Any) -> list[dict[str, Any]]:
    """Return rows of a directory as its random access gives them; it unpacks compressed shards beside themselves."""
    options = {"local": str(directory), "shuffle": False, "batch_size": 1, **options}
    dataset = StreamingDataset(**options)
    return [dataset[number] for number in order]
