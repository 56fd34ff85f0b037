"""Run stages on several ranks, each in forks of this process: ``ranks_program.py JOBS.json``.

A job is ``{"config": RunConfig, "ranks": int, "log": beginning of the names of the ranks' logs}``. This module imports
little: the checkpoint writer starts a process that imports it again.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from tests.support.fork_ranks import run_ranks


def main() -> None:
    """Run every job; the first that fails ends the program."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    for job in json.loads(Path(sys.argv[1]).read_text()):
        if any(run_ranks(functools.partial(run, job["config"]), job["ranks"], job["log"])):
            logs = (Path(f"{job['log']}.rank{rank}.log") for rank in range(job["ranks"]))
            sys.exit("\n".join(f"{log}\n{log.read_text()[-4000:]}" for log in logs))


def run(config: dict[str, Any], rank: int) -> None:
    """Be one rank of a job."""
    from nemo_prolong.config.schema import RunConfig
    from nemo_prolong.stages.run import run_stage

    run_stage(RunConfig(**config), [])


if __name__ == "__main__":
    main()
