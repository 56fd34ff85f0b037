"""Watch a run in the terminal: progress, ETA, loss, tokens/s, MFU, memory, the last events. Ctrl-C ends it."""

import argparse
import contextlib
import time
from pathlib import Path

from rich.live import Live

from nemo_prolong.config.ending import clean_ending, end_with_the_reader
from nemo_prolong.errors import CheckpointError
from nemo_prolong.report.terminal.layout import open_console
from nemo_prolong.report.terminal.watch import RunWatch

PIPED_WIDTH = 120
"""Columns of a frame in a pipe."""


def watch(run: Path, seconds: float, once: bool) -> None:
    """Print one frame, or renew it until the run is over."""
    state, console = RunWatch(run), open_console(piped_width=PIPED_WIDTH)
    if once:
        console.print(state.frame())
        return
    with contextlib.suppress(KeyboardInterrupt), Live(state.frame(), console=console, auto_refresh=False) as live:
        while not state.is_over:
            time.sleep(seconds)
            state.refresh()
            live.update(state.frame(), refresh=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, such as runs/stage1")
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two frames (default: 2)")
    args = parser.parse_args()
    with clean_ending(CheckpointError):
        end_with_the_reader()
        watch(args.run, args.seconds, args.once)


if __name__ == "__main__":
    main()
