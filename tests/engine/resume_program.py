"""Train stages and go on with them on other numbers of ranks: ``resume_program.py JOBS.json``.

A job is ``{"config": RunConfig, "ranks": int, "log": str, "copy": [from, to] or null}``; with ``copy`` the runs
directory is copied first and every checkpoint but the first is removed, as if the run had been killed after it. NeMo is
imported once; every rank is a fork of this process.

This module imports little: the checkpoint writer starts a process that imports it again.
"""

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from tests.support.fork_ranks import run_ranks


def train(job: dict[str, Any], rank: int) -> None:
    """Be one rank of a job."""
    from nemo_prolong.stages.run import run_stage

    run_stage(RunConfig(**job["config"]), [])
    # Everything is saved, and taking NeMo apart takes longer than these stages.
    os._exit(0)


def leave_first_checkpoint(source: str, target: str) -> None:
    """Copy runs as a kill after their first checkpoint would have left them."""
    shutil.copytree(source, target)
    for checkpoints in Path(target).rglob("checkpoints"):
        for later in sorted(checkpoints.iterdir())[1:]:
            shutil.rmtree(later)


def main() -> None:
    """Run every job; the first that fails ends the program."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    for job in json.loads(Path(sys.argv[1]).read_text()):
        if job["copy"]:
            leave_first_checkpoint(*job["copy"])
        if any(run_ranks(functools.partial(train, job), job["ranks"], job["log"])):
            logs = (f"{job['log']}.rank{rank}.log" for rank in range(job["ranks"]))
            sys.exit("\n".join(f"{log}\n{Path(log).read_text()[-4000:]}" for log in logs))


if __name__ == "__main__":
    main()
