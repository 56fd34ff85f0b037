"""Write the job file of a stage."""

import sys
from pathlib import Path

from nemo_prolong.config.cli import hydra_script, typed_config_flags
from nemo_prolong.config.rules import check_world
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.launch.slurm import render_sbatch
from nemo_prolong.plan.time_limits import with_job_limits
from nemo_prolong.records.run_directory import RunDirectory

DESCRIPTION = """\
Print a Slurm job for one stage. It takes what scripts/train.py takes; the group cluster says where it runs, the group
parallelism on how many GPUs. The job saves before its time is up and puts itself back into the queue."""

EXAMPLES = [
    "python scripts/launch.py +exp=stage2 > stage2.sbatch && sbatch stage2.sbatch",
    "python scripts/launch.py +exp=stage1 parent=hf:DIR cluster.partition=h100 cluster.time_limit=12:00:00",
]


def run(cfg: RunConfig, overrides: list[str]) -> None:
    """Print the job for the planned number of ranks."""
    check_world(cfg, cfg.parallelism.planned_world_size, overrides)
    cfg = with_job_limits(cfg, RunDirectory(cfg.run_dir))
    sys.stdout.write(render_sbatch(cfg, [*typed_config_flags(), *overrides], Path.cwd()))


def main() -> None:
    """Read the command line."""
    hydra_script(RunConfig, "train", run, DESCRIPTION, EXAMPLES, help_overrides=["+exp=stage2"])


if __name__ == "__main__":
    main()
