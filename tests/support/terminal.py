"""What a pipe or a terminal gets of something that rich prints."""

import io

from rich.console import Console


def printed(*parts, color=False, width=None):
    """Return the text; a terminal if there are colours, a pipe without a width of its own if not."""
    console = Console(
        file=io.StringIO(),
        color_system="standard" if color else None,
        force_terminal=color,
        width=width or (80 if color else 10_000),
        highlight=False,
    )
    for part in parts:
        console.print(part, soft_wrap=True)
    return console.file.getvalue()
