"""``python -m benchmarks.hopper``: verify this software on a GPU, in 25 minutes, or in 9 with ``--quick``."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from nemo_prolong.errors import ConfigError


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line.

    Raises:
        ConfigError: If settings do not go together.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hopper", description="Verify this software on a GPU.")
    parser.add_argument("--stages", help="names with commas between them; default: all")
    parser.add_argument("--quick", action="store_true", help="the figures that matter most, within --seconds")
    parser.add_argument("--cases", help="with --quick: names with commas between them; default: all")
    parser.add_argument("--seconds", type=float, help="with --quick: time of the whole check; default: 540")
    parser.add_argument("--device", default="cuda:0", choices=("cuda:0", "cpu"), help="cpu runs small sizes")
    parser.add_argument("--json", type=Path, help="card to write or to add to; the page is written beside it")
    arguments = parser.parse_args(words)
    if arguments.quick and arguments.stages:
        raise ConfigError("--stages", "the quick check has cases and no stages.", "Name them with --cases.")
    for name in ("cases", "seconds"):
        if getattr(arguments, name) is not None and not arguments.quick:
            raise ConfigError(f"--{name}", "it is a setting of the quick check.", "Add --quick, or leave it out.")
    return arguments


def main() -> None:
    """Read the command line."""
    try:
        # Asked to end, as by Ctrl-C: what runs is ended, and what it has shown is kept.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        arguments = parsed()
        # Imported here, because the quick check starts without torch and works without pydantic.
        if arguments.quick:
            from benchmarks.hopper.quick.program import run
        else:
            from benchmarks.hopper.all_stages import run
        sys.exit(run(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
