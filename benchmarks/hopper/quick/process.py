"""A process that runs cases, as its supervisor sees it. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]
_ENDING_SECONDS = 10.0

# Rows of many lengths leave holes in the allocator's memory otherwise, as training sets it.
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class Worker:
    """A process that is told the names of cases and answers in JSON lines.

    Args:
        program: The command; the number of the descriptor for its answers is added.
        log: What it prints is added to this file.
    """

    def __init__(self, program: list[str], log: Path) -> None:
        reading, writing = os.pipe()
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [*program, str(writing)],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                start_new_session=True,
                text=True,
                env={**_ENVIRONMENT, **os.environ},
            )
        os.close(writing)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor) as lines, contextlib.suppress(ValueError):
            for line in lines:
                self._answers.put(json.loads(line))
        # The process has ended, or it was ended within a line.
        self._answers.put(None)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return what it says next; None when it says no more.

        Raises:
            TimeoutError: If it says nothing for so long.
        """
        try:
            return self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError from None

    def rest(self) -> Iterator[dict[str, Any]]:
        """Yield what a process that was stopped had said by then."""
        while (answer := self._answers.get(timeout=_ENDING_SECONDS)) is not None:
            yield answer

    def ask(self, name: str) -> None:
        """Have it run a case."""
        assert self._process.stdin is not None
        # One that has ended is found out by its answers.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()

    def status(self) -> int:
        """Return the exit status of a process that says no more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)
        return self.stop()

    def stop(self) -> int:
        """End the process with everything that it has started, and return its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        return status
