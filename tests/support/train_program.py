"""Train the stages that a JSON file describes, one after the other.

Run as ``train_program.py JOBS.json [RANKS]``. A job is ``{"config": RunConfig, "resume": path or null,
"parent_checkpoint": path or null}``. With RANKS, each job is trained by as many forks of this process: one import for
all, and new process groups for each.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.logs import run_logging
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fork_ranks import run_ranks


def train(job: dict[str, Any], _rank: int = 0) -> None:
    """Train one job as the rank that the environment says."""
    cfg = RunConfig(**job["config"])
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with run_logging(run_dir / f"train.rank{os.environ.get('RANK', '0')}.log", console=False):
        from nemo_prolong.engine import train_stage

        train_stage(
            cfg,
            RunDirectory(run_dir),
            *(Path(job[key]) if job[key] else None for key in ("resume", "parent_checkpoint")),
        )


def train_by_forks(job: dict[str, Any], ranks: int) -> None:
    """Train one job on some ranks; a rank that fails ends this program with what it wrote."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    log = f"{RunConfig(**job['config']).run_dir}.log"
    statuses = run_ranks(partial(train, job), ranks, log)
    if any(statuses):
        written = "\n".join(Path(f"{log}.rank{rank}.log").read_text()[-3000:] for rank in range(ranks))
        sys.exit(f"{log}: the ranks ended with {statuses}\n{written}")


def main() -> None:
    """Run every job."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if len(sys.argv) > 2:
            train_by_forks(job, int(sys.argv[2]))
        else:
            train(job)


if __name__ == "__main__":
    main()
