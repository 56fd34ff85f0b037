"""Reads a Dockerfile and its .dockerignore, as much of them as this repository uses."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, and what follows it with the lines joined."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


def instructions(dockerfile: str) -> Iterator[Instruction]:
    """Yield the instructions of a Dockerfile; comments are left out, also those between continued lines."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in joined.splitlines():
        if line.strip():
            name, _, text = line.partition(" ")
            yield Instruction(name.upper(), text.strip())


def substituted(text: str, variables: Mapping[str, str]) -> str:
    """Return ``text`` with ``$NAME`` and ``${NAME}`` replaced; a name that is not known is empty."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def assignments(text: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Return name -> value of ``NAME=value OTHER="with spaces"``, as ENV, ARG and LABEL have them."""
    pairs = (word.partition("=") for word in shlex.split(substituted(text, variables)))
    return {name: value for name, _, value in pairs}


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether the last pattern that matches ``path`` or a folder above it leaves it out."""
    ignored = False
    for pattern in patterns:
        negated = pattern.startswith("!")
        parts = re.split(r"(\*\*/|\*)", pattern.removeprefix("!"))
        expression = "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
        if re.fullmatch(f"{expression}(?:/.*)?", path):
            ignored = not negated
    return ignored


def context(root: Path) -> list[str]:
    """Return the files that ``COPY .`` takes: what git knows or would take, less .dockerignore."""
    lines = (root / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in listed if name and (root / name).exists() and not is_ignored(name, patterns))
