"""The files of a launch: what is in them, where they are kept, and the command that submits them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_prolong.config.commands import shell_command
from nemo_prolong.config.schema import LaunchTarget
from nemo_prolong.errors import ConfigError
from nemo_prolong.files import write_text_atomically
from nemo_prolong.launch.kubernetes import render_manifest
from nemo_prolong.launch.machine import render_docker, render_local
from nemo_prolong.launch.parts import LAUNCH_DIRECTORY, LaunchPart
from nemo_prolong.launch.slurm import render_chain, render_sbatch


@dataclass(frozen=True)
class Launch:
    """What is submitted.

    Attributes:
        files: Each file with its content; the last one is what the command names.
        command: Submits them.
    """

    files: tuple[tuple[Path, str], ...]
    command: tuple[str, ...]

    def text(self) -> str:
        """Return the content of the only file, or all files with a line that names each."""
        if len(self.files) == 1:
            return self.files[0][1]
        return "\n".join(f"# ---- {path}\n{content}" for path, content in self.files)

    def write(self) -> None:
        """Write the files.

        Raises:
            OSError: If one cannot be written.
        """
        for path, content in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, content)

    def submit(self) -> int:
        """Run the command that submits the files, and return its exit code.

        Raises:
            ConfigError: If it is not installed here.
        """
        try:
            return subprocess.run(self.command, check=False).returncode
        except FileNotFoundError as error:
            raise ConfigError(
                f"launch.submit=true: {self.command[0]}",
                "is not installed on this machine.",
                f"Run it where it is: {shell_command(self.command)}",
            ) from error


def plan_launch(parts: Sequence[LaunchPart], directory: Path) -> Launch:
    """Return what starts these parts, one after the other.

    Args:
        parts: A stage, or the parts of a chain. The first one says how they are started. Docker and a plain process
            take one part, which may be a recipe.
        directory: What relative paths of the configuration begin at.
    """
    target, last = parts[0].launch.target, parts[-1]
    kept = last.run_dir(directory) / LAUNCH_DIRECTORY
    if target is LaunchTarget.SLURM:
        return _slurm(parts, directory, kept)
    if target is LaunchTarget.KUBERNETES:
        manifest = kept / f"{last.job_name}.yaml"
        return Launch(((manifest, render_manifest(parts)),), ("kubectl", "create", "-f", str(manifest)))
    (part,) = parts
    render = render_docker if target is LaunchTarget.DOCKER else render_local
    script = kept / f"{target}.sh"
    return Launch(((script, render(part, directory)),), ("bash", str(script)))


def _slurm(parts: Sequence[LaunchPart], directory: Path, kept: Path) -> Launch:
    jobs = [
        (part, part.run_dir(directory) / LAUNCH_DIRECTORY / f"{part.job_name}.sbatch", render_sbatch(part, directory))
        for part in parts
    ]
    files = tuple((path, text) for _, path, text in jobs)
    if len(files) == 1:
        return Launch(files, ("sbatch", str(files[0][0])))
    chain = kept / "chain.sh"
    text = render_chain([(part.name, path) for part, path, _ in jobs])
    return Launch((*files, (chain, text)), ("bash", str(chain)))


def submitted_by(launch: Launch) -> str:
    """Return how files that were written are submitted, for a person.

    >>> submitted_by(Launch(((Path("a b.sbatch"), ""),), ("sbatch", "a b.sbatch")))
    "submit it with: sbatch 'a b.sbatch'"
    """
    return f"submit {'it' if len(launch.files) == 1 else 'them'} with: {shell_command(launch.command)}"
