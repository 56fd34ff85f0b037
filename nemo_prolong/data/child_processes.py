"""Processes that this one starts to read or prepare data: Ctrl-C is not for them. Needs no torch."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker


def start_loader_server() -> None:
    """Start the process that loader processes are forked from. Ctrl-C is not for it, nor for what it forks."""
    with interrupts_held_back():
        forkserver.ensure_running()


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends; processes that are started in the block never get it.

    A terminal sends it to every process of a command. Each would print a traceback, and the main process ends them all.
    """
    # Started by the first child otherwise, it would lift the block: it does so for itself.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
