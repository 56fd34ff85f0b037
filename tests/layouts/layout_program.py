"""Train at many layouts, each in forks of this process, so that NeMo is imported once: ``layout_program.py JOBS.json``.

A job is ``{"config": RunConfig, "ranks": int, "parent": checkpoint or null, "reload": checkpoint or null}``. A run
leaves its checkpoints, its metrics and, in ``validation/``, the token losses of every rank's first validation. A job
with ``reload`` loads that checkpoint and saves what it then has, before any step.

This module imports little: the checkpoint writer starts a process that imports it again.
"""

import functools
import json
import sys
from pathlib import Path

from tests.support.fork_ranks import run_ranks


def main() -> None:
    """Run every job; the first that fails ends the program."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    from tests.layouts.layout_rank import run

    for job in json.loads(Path(sys.argv[1]).read_text()):
        if any(run_ranks(functools.partial(run, job), job["ranks"], job["log"])):
            logs = (f"{job['log']}.rank{rank}.log" for rank in range(job["ranks"]))
            sys.exit("\n".join(f"{log}\n{Path(log).read_text()[-4000:]}" for log in logs))


if __name__ == "__main__":
    main()
