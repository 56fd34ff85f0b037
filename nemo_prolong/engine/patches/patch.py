"""What a change of foreign code is, and whether the versions it was written for are the installed ones."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

MEGATRON = {"megatron-core": "0.15.3"}
NEMO = {"nemo-toolkit": "2.7.3"}
BOTH = NEMO | MEGATRON


@dataclass(frozen=True)
class Patch:
    """One change of foreign code.

    Attributes:
        name: Short name, unique.
        why: What the library does, and what it does with the patch.
        apply: Makes the change in this process.
        versions: Package and version it was written for. Where they differ, ``prepare`` warns.
        after_import: True if it changes Megatron or NeMo itself, whose import must come first.
        with_gpu: True if a machine with a GPU needs it too.
        per_object: True if it changes single objects. Their owner calls ``apply``, and ``prepare`` does not.
    """

    name: str
    why: str
    apply: Callable[..., None]
    versions: Mapping[str, str]
    after_import: bool = False
    with_gpu: bool = False
    per_object: bool = False


def replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Return a function that sets an attribute of a foreign module or class."""
    return lambda: setattr(owner, name, value)


def warnings_of_versions(patches: Iterable[Patch]) -> list[str]:
    """Return a warning for every library whose installed version is another than its patches were written for."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for patch in patches:
        for package, expected in patch.versions.items():
            names[package, expected].append(patch.name)
    return [
        f"{package} {found or 'without a version'} is installed, and changes of it were written for {expected}: "
        f"{', '.join(patched)}. Run tests/engine/test_patches.py before you trust a run."
        for (package, expected), patched in names.items()
        if not _same_release(found := _installed(package), expected)
    ]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _same_release(found: str | None, expected: str) -> bool:
    """Whether two versions have the same numbers; images carry builds such as ``2.7.3rc1+abc``."""
    return found is not None and Version(found).release == Version(expected).release
