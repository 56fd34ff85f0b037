"""Train and resume without each CPU patch in turn; ``patch_program.py DATA OUTPUT`` writes {patch: exit status}.

NeMo is imported once, then every case runs in a fork of this process. The case "none" leaves nothing out.
"""

import json
import os
import sys
from pathlib import Path

import nemo.lightning  # noqa: F401 - imported before the forks, without any patch
from nemo.collections import llm  # noqa: F401 - likewise

from nemo_prolong.engine.patches import cpu
from tests.support.tiny import tiny_config


def train_and_resume(data: Path, runs: Path, without: str | None) -> None:
    """Train two steps with recomputation, save, and resume for two more."""
    cpu.prepare(without=without)
    from nemo_prolong.engine.training.stage_training import train_stage

    cfg = tiny_config(
        data,
        runs,
        train={"train_iters": 4},
        checkpoint={"save_interval_steps": 2},
        precision={
            "compute": "fp32",
            "recompute": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        },
    )
    resumed = cfg.model_copy(update={"name": "resumed"})
    for run in (cfg, resumed):
        Path(run.run_dir).mkdir(parents=True)
    train_stage(cfg, None, None)
    train_stage(resumed, Path(cfg.run_dir) / "checkpoints" / "step_00000002", None)


def status_of_fork(data: Path, runs: Path, without: str | None) -> int:
    """Return the exit status of one case."""
    child = os.fork()
    if child == 0:
        log = os.open(runs.with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            train_and_resume(data, runs, without)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status)


def main() -> None:
    """Run every case."""
    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    names = [None, *(patch.name for patch in cpu.patches())]
    statuses = {str(name).lower(): status_of_fork(data, output.with_name(f"runs_{name}"), name) for name in names}
    output.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
