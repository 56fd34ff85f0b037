"""Render a Slurm job for a stage, with one task per GPU. It is asked to save before its time is up, and then requeued.

srun starts the ranks itself, so no second launcher runs on the nodes. Slurm signals the batch shell, which hands the
signal on to the ranks. They save, exit with 75, and the job goes back into the queue and resumes. So does a job whose
ranks hung, if it saved a checkpoint before. One that hangs without getting on is left to be looked at. Any other exit
code ends it. The file holds no secrets. What the job needs beyond it comes from the environment of ``sbatch``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from nemo_prolong.config.commands import shell_word
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import EXIT_PREEMPTED

_TEMPLATES = Path(__file__).parent / "templates"


def render_sbatch(cfg: RunConfig, arguments: Sequence[str], directory: Path) -> str:
    """Return the text of a job file for ``sbatch``.

    The job does not depend on where it is submitted from. In a container image the directory is that of the image.

    Args:
        cfg: A checked configuration. Its ``parallelism`` says how many nodes and GPUs, its ``cluster`` where.
        arguments: What is typed after ``scripts/train.py``.
        directory: What relative paths of the configuration begin at.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # noqa: S701 - a shell script; its template quotes what the shell reads
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shell_word
    directory = directory.absolute()
    script = CONFIG_DIR.parent / "scripts" / "train.py"
    return environment.get_template("job.sbatch.j2").render(
        job_name=_job_name(cfg.name),
        directory=str(directory),
        run_dir=os.path.join(directory, cfg.run_dir),
        parallelism=cfg.parallelism,
        cluster=cfg.cluster,
        command=["scripts/train.py" if cfg.cluster.container_image else str(script), *arguments],
        exit_preempted=EXIT_PREEMPTED,
    )


def _job_name(name: str) -> str:
    """Return a name that sbatch takes as it is: it splits at blanks, ends at #, and expands % in file names.

    >>> _job_name("demo/my run #2"), _job_name("-x")
    ('demo-my-run-2', 'x')
    """
    return re.sub(r"[^\w.+]+", "-", name).strip("-") or "run"
