"""Train at many layouts, each in forks of this process, so that NeMo is imported once: ``layout_program.py JOBS.json``.

A job is ``{"config": RunConfig, "ranks": int, "parent": checkpoint or null, "reload": checkpoint or null}``. A run
leaves its checkpoints, its metrics and, in ``validation/``, the token losses of every rank's first validation. A job
with ``reload`` loads that checkpoint and saves what it then has, before any step.

This module imports little: the checkpoint writer starts a process that imports it again.
"""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def fork(run: Callable[[Job, int], None], job: Job, rank: int, port: int) -> int:
    """Start one rank and return its process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{job['log']}.rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run(job, rank)
    # Not os._exit: the checkpoint writer's own process ends with an orderly exit only.
    sys.exit(0)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Run every job; the first that fails ends the program."""
    from layout_rank import run

    for job in json.loads(Path(sys.argv[1]).read_text()):
        port = free_port()
        children = [fork(run, job, rank, port) for rank in range(job["ranks"])]
        failed = False
        while children:
            child, wait_status = os.wait()
            children.remove(child)
            if os.waitstatus_to_exitcode(wait_status) and not failed:
                failed = True
                for other in children:
                    os.kill(other, 9)
        if failed:
            logs = (f"{job['log']}.rank{rank}.log" for rank in range(job["ranks"]))
            sys.exit("\n".join(f"{log}\n{Path(log).read_text()[-4000:]}" for log in logs))


if __name__ == "__main__":
    main()
