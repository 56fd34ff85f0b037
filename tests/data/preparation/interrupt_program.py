"""Tasks that take long, in a pool of two processes; ``interrupt_program.py DIRECTORY`` notes each process there.

With ``itself`` behind it the program gets Ctrl-C while it starts the processes.
"""

import functools
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nemo_prolong.config.ending import clean_ending
from nemo_prolong.data.preparation import workers
from nemo_prolong.data.preparation.progress import Progress


def work(directory: Path) -> None:
    """Say that this process is at work."""
    (directory / str(os.getpid())).touch()
    time.sleep(600)


class InterruptedPool(ProcessPoolExecutor):
    """A pool that gets Ctrl-C with every task."""

    def submit(self, *arguments, **keywords):
        os.kill(os.getpid(), signal.SIGINT)
        return super().submit(*arguments, **keywords)


if __name__ == "__main__":
    if sys.argv[2:] == ["itself"]:
        workers.ProcessPoolExecutor = InterruptedPool
    with clean_ending():
        workers.run_tasks([functools.partial(work, Path(sys.argv[1]))] * 4, 2, Progress("working", 1, "bytes"))
