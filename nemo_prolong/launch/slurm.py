"""Render a Slurm job for a stage, with one task per GPU. It is asked to save before its time is up, and then requeued.

srun starts the ranks itself, so no second launcher runs on the nodes. Slurm signals the batch shell, which hands the
signal on to the ranks. They save, exit with 75, and the job goes back into the queue and resumes. So does a job whose
ranks hung, if it saved a checkpoint before. One that hangs without getting on is left to be looked at. Any other exit
code ends it. The file holds no secrets. What the job needs beyond it comes from the environment of ``sbatch``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import EXIT_PREEMPTED

_TEMPLATES = Path(__file__).parent / "templates"


def render_sbatch(cfg: RunConfig, overrides: Sequence[str]) -> str:
    """Return the text of a job file for ``sbatch``.

    Args:
        cfg: A checked configuration. Its ``parallelism`` says how many nodes and GPUs, its ``cluster`` where.
        overrides: What is typed after ``scripts/train.py``.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # noqa: S701 - a shell script; its template quotes what the shell reads
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shlex.quote
    return environment.get_template("job.sbatch.j2").render(
        job_name=cfg.name.replace("/", "-"),
        run_dir=cfg.run_dir,
        parallelism=cfg.parallelism,
        cluster=cfg.cluster,
        command=["scripts/train.py", *overrides],
        exit_preempted=EXIT_PREEMPTED,
    )
