"""Shell scripts from templates, with every value quoted for bash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from nemo_prolong.config.commands import shell_command, shell_word

_DIRECTORY = Path(__file__).parent / "templates"


def _in_quotes(word: str) -> str:
    """Return a word as bash reads it back, in quotes also where it needs none."""
    quoted = shell_word(word)
    return quoted if quoted != word else f"'{word}'"


def render_template(name: str, **values: Any) -> str:
    """Return a file of ``templates/`` with these values in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DIRECTORY),
        autoescape=False,  # noqa: S701 - a shell script; its template quotes what the shell reads
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shell_word
    environment.filters["in_quotes"] = _in_quotes
    environment.filters["command"] = shell_command
    return environment.get_template(name).render(**values)
