"""A stage or a chain of stages on one machine: in a Docker container, or as a plain process.

``scripts/train.py`` starts one process for each GPU itself and hands signals on to them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_prolong.launch.parts import LaunchPart
from nemo_prolong.launch.templates import render_template


def render_local(part: LaunchPart, directory: Path) -> str:
    """Return a script that runs a part on this machine.

    Args:
        part: What it runs.
        directory: What relative paths of the configuration begin at.
    """
    return render_template(
        "run.sh.j2",
        purpose="Runs on this machine. SIGTERM and SIGUSR1 ask it to save and stop; the same command goes on.",
        directory=str(directory.absolute()),
        environment=part.environment,
        # Of the environment that this command was typed in.
        words=[sys.executable, *part.words[1:]],
    )


def render_docker(part: LaunchPart, directory: Path) -> str:
    """Return a script that runs a part in a container of this machine.

    Args:
        part: What it runs.
        directory: Where the command is typed. The container sees its mounts only.
    """
    return render_template(
        "run.sh.j2",
        purpose="`docker stop` asks it to save and stop; the same command goes on.",
        directory=str(directory.absolute()),
        environment={},
        words=_docker_words(part),
    )


def _docker_words(part: LaunchPart) -> list[str]:
    cluster = part.cluster
    options = [
        *("--rm", "--init", f"--name={part.job_name}", "--gpus=all"),
        # NCCL and loader processes share memory, which Docker limits to 64 MiB otherwise. Pinned memory is locked.
        *("--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864"),
        f"--stop-timeout={cluster.signal_seconds}",
        *(f"--volume={mount}" for mount in cluster.container_mounts),
        *([f"--workdir={cluster.container_workdir}"] if cluster.container_workdir else []),
        *(f"--env={name}={value}" for name, value in part.environment.items()),
        # Without a value Docker takes that of its own environment.
        *(f"--env={name}" for name in cluster.secrets),
    ]
    assert cluster.container_image is not None, "checked with the configuration"
    return ["docker", "run", *options, cluster.container_image, *part.words]
