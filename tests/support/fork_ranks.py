"""Several ranks as forks of one process, so that NeMo is imported once for all launches of a program.

A program that uses this imports NeMo before it forks, but not when it is imported itself: the checkpoint writer starts
a process that imports the main module again.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from tests.support.turns import turn


def run_ranks(
    run: Callable[[int], None], ranks: int, log: str, seconds_after_first_end: float | None = None
) -> list[int]:
    """Run a function once per rank and return their exit statuses; a killed rank has the negative signal number.

    Args:
        run: Called with the rank; the environment is that of torchrun.
        ranks: Number of ranks.
        log: Beginning of the names of the files that take the output: ``LOG.rankN.log``.
        seconds_after_first_end: What is left of the ranks this long after the first one has ended is killed; None kills
            the others only when one fails.
    """
    with turn():
        port = _free_port()
        children = {_fork(run, rank, ranks, port, log): rank for rank in range(ranks)}
        return _wait(children, seconds_after_first_end)


def _wait(children: dict[int, int], seconds_after_first_end: float | None) -> list[int]:
    """Return the exit statuses of ranks by their processes."""
    statuses: dict[int, int] = {}
    deadline = None
    while len(statuses) < len(children):
        child, wait_status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[children[child]] = os.waitstatus_to_exitcode(wait_status)
            if seconds_after_first_end is not None:
                deadline = deadline or time.monotonic() + seconds_after_first_end
            elif statuses[children[child]]:
                deadline = time.monotonic()
        elif deadline is not None and time.monotonic() > deadline:
            for other, rank in children.items():
                if rank not in statuses:
                    os.kill(other, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.05)
    return [statuses[rank] for rank in range(len(children))]


def _fork(run: Callable[[int], None], rank: int, ranks: int, port: int, log: str) -> int:
    child = os.fork()
    if child:
        return child
    output = os.open(f"{log}.rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(rank)
    # Not os._exit: the checkpoint writer's own process ends with an orderly exit only.
    sys.exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
