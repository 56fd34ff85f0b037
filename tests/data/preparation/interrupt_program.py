"""Tasks that take long, in a pool of two processes; ``interrupt_program.py DIRECTORY`` notes each process there."""

import functools
import os
import sys
import time
from pathlib import Path

from nemo_prolong.config.ending import clean_ending
from nemo_prolong.data.preparation.progress import Progress
from nemo_prolong.data.preparation.workers import run_tasks


def work(directory: Path) -> None:
    """Say that this process is at work."""
    (directory / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    with clean_ending():
        run_tasks([functools.partial(work, Path(sys.argv[1]))] * 4, 2, Progress("working", 1, "bytes"))
