"""Two ranks that train with and without overlaps; ``overlap_program.py JOBS.json OUTPUT`` forks them once per job.

The file has ``{"jobs": [...], "stages": {name: RunConfig}}``. What ``overlap_settings`` finds for the stages is written
to OUTPUT. A job is ``{"config": RunConfig, "resume": checkpoint or null}``. The gradient of step ``SPOILED_STEP`` is no
number on rank 1, so that all ranks skip the step. Every rank writes ``weights.rankN.json`` into the run directory: a
hash of its weights at the end of each step, and after the validation that follows it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.records.run_directory import RunDirectory
from tests.engine.fault_program import FAULTS
from tests.support.fork_ranks import run_ranks

RANKS = 2
SPOILED_STEP = 3


def watch_weights(path: Path) -> None:
    """Hash the weights of this rank at the end of every step and of every validation."""
    from nemo_prolong.callbacks.step_guard import StepGuard

    seen: dict[str, dict[int, str]] = {"step": {}, "validation": {}}

    def watch(moment: str, loop: Any) -> None:
        sha256 = hashlib.sha256()
        for _, parameter in loop._trainer.strategy.megatron_parallel.named_parameters():
            sha256.update(parameter.detach().contiguous().numpy().tobytes())
        seen[moment][loop.step] = sha256.hexdigest()
        path.write_text(json.dumps(seen))

    StepGuard.on_step_end = lambda self, loop: watch("step", loop)  # type: ignore[method-assign]
    StepGuard.on_validation_end = lambda self, loop: watch("validation", loop)  # type: ignore[method-assign]


def run(job: dict[str, Any], rank: int) -> None:
    """Be one rank of a job."""
    from nemo_prolong.engine.training.stage_training import train_stage

    cfg = RunConfig(**job["config"])
    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    watch_weights(run_dir / f"weights.rank{rank}.json")
    if rank == 1:
        FAULTS["nan"]({"step": SPOILED_STEP}, rank)
    train_stage(cfg, RunDirectory(run_dir), Path(job["resume"]) if job["resume"] else None, None)
    # Everything is saved, and taking NeMo apart takes longer than these stages.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Run every job; the first that fails ends the program."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks
    from tests.engine.overlap_settings import found

    asked = json.loads(Path(sys.argv[1]).read_text())
    stages = {name: RunConfig(**values) for name, values in asked["stages"].items()}
    Path(sys.argv[2]).write_text(json.dumps(found(stages)))
    for job in asked["jobs"]:
        log = f"{RunConfig(**job['config']).run_dir}.log"
        Path(log).parent.mkdir(exist_ok=True)
        if any(run_ranks(functools.partial(run, job), RANKS, log)):
            sys.exit("\n".join(f"{log}\n{Path(f'{log}.rank{rank}.log').read_text()[-4000:]}" for rank in range(RANKS)))


if __name__ == "__main__":
    main()
