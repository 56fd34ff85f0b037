"""Slurm jobs: one task per GPU, asked to save before time is up, and then requeued.

srun starts the ranks itself, so no second launcher runs on the nodes, and ``scripts/train.py`` takes its rank from
Slurm's variables. Slurm signals the batch shell, which hands the signal on to the ranks. They save, exit with 75, and
the job goes back into the queue and resumes. ``launch.failures`` judges every other end but success. The file holds no
secrets. What the job needs beyond it comes from the environment of ``sbatch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_prolong.config.mounts import container_path
from nemo_prolong.errors import EXIT_PREEMPTED
from nemo_prolong.launch.parts import LAUNCH_DIRECTORY, LaunchPart
from nemo_prolong.launch.templates import render_template


def render_sbatch(part: LaunchPart, directory: Path) -> str:
    """Return the text of a job file for ``sbatch``.

    The job does not depend on where it is submitted from.

    Args:
        part: What the job runs.
        directory: Where the job starts, and what relative paths of the configuration begin at outside of a container.
    """
    cluster, run_dir = part.cluster, part.run_dir(directory)
    container = _container_options(part)
    return render_template(
        "job.sbatch.j2",
        part=part,
        cluster=cluster,
        directory=str(directory.absolute()),
        launch_directory=str(run_dir / LAUNCH_DIRECTORY),
        run_dir=str(container_path(cluster, part.cfg.run_dir) if container else run_dir),
        container=container,
        judge=["python", part.script_path("judge_failure.py")],
        exit_preempted=EXIT_PREEMPTED,
    )


def _container_options(part: LaunchPart) -> list[str]:
    """Return the options of srun that pyxis reads; none without an image."""
    cluster = part.cluster
    if cluster.container_image is None:
        return []
    options = [f"--container-image={cluster.container_image}"]
    if cluster.container_mounts:
        options.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    if cluster.container_workdir is not None:
        options.append(f"--container-workdir={cluster.container_workdir}")
    # pyxis keeps variables of the image that have the same name. These are to win over the image's.
    return [*options, f"--container-env={','.join(part.environment)}"] if part.environment else options


def render_chain(files: Sequence[tuple[str, Path]]) -> str:
    """Return a script that submits jobs one after the other, each for when the one before it has ended well.

    Args:
        files: What each job is called, and its file.
    """
    return render_template("chain.sh.j2", files=[(name, str(path)) for name, path in files])
