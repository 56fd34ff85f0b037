"""Which modules of the package import which, read from their sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def module_name(file: str) -> str:
    """Return the module of a file, by its path from the root of the repository."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def dependents(root: Path, file: str) -> set[str]:
    """Return the modules of the package that import a file, directly or through others, and the module itself."""
    files = [str(path.relative_to(root)) for path in (root / file.split("/")[0]).rglob("*.py")]
    imported = {module_name(each): set(_imported((root / each).read_text())) for each in files}
    for name, names in imported.items():
        # A module is imported after the packages that it lies in.
        names.update(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))
    found = {module_name(file)}
    while True:
        more = {name for name, names in imported.items() if _reaches(names, found)} - found
        if not more:
            return found
        found |= more


def _reaches(names: set[str], found: set[str]) -> bool:
    # Whoever imports a module imports the packages that it lies in.
    return any(name == one or name.startswith(f"{one}.") for name in names for one in found)


def _imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
