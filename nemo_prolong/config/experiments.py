"""The experiments of ``conf/exp/``: their names, and the script that each of them says it is for.

A file says so in its header, with the line ``# @script train`` beside Hydra's own ``# @package _global_``. A file that
says nothing, such as one of a user's own, goes with every script.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_prolong.errors import ConfigError

EXPERIMENT_GROUP = "exp"
"""The group whose files are experiments."""

_HEADER = re.compile(r"\s*#\s*@script\s+(\S+)\s*")


def experiments(config_dirs: Sequence[Path], script: str) -> list[str]:
    """Return the names of the experiments for a script, as they are typed after ``+exp=``.

    Args:
        config_dirs: Directories that hold the groups.
        script: Name of a script without ``.py``.
    """
    found = {name: declared_script(path) for name, path in _files(config_dirs)}
    return sorted(name for name, declared in found.items() if declared in (None, script))


def declared_script(path: Path) -> str | None:
    """Return the script that an experiment's header names, without ``.py``; None where it names none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.lstrip().startswith("#"):
                return None
            if match := _HEADER.fullmatch(line):
                return match[1]
    return None


def check_experiment(script: str, overrides: Sequence[str], config_dirs: Sequence[Path]) -> None:
    """Refuse an experiment that is for another script.

    Args:
        script: Name of the script that was started, without ``.py``.
        overrides: What was typed.
        config_dirs: Directories that hold the groups.

    Raises:
        ConfigError: If there is one among ``overrides``.
    """
    paths = dict(_files(config_dirs))
    for override in overrides:
        name = override.removeprefix(f"+{EXPERIMENT_GROUP}=")
        declared = declared_script(paths[name]) if name != override and name in paths else None
        if declared not in (None, script):
            available = ", ".join(experiments(config_dirs, script))
            rule = f"is an experiment of scripts/{declared}.py."
            raise ConfigError(override, rule, f"Type +{EXPERIMENT_GROUP}=NAME, one of: {available}.")


def _files(config_dirs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield every experiment's name and file; Hydra takes the first of those with one name."""
    found: dict[str, Path] = {}
    for root in (directory / EXPERIMENT_GROUP for directory in config_dirs):
        for path in root.rglob("*.yaml"):
            found.setdefault(path.relative_to(root).with_suffix("").as_posix(), path)
    yield from found.items()
