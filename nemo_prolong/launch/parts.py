"""What is started: one script on some ranks, with the configuration that says where."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.mounts import host_path, seen_path
from nemo_prolong.config.schema import ClusterConfig, LaunchConfig, RunConfig
from nemo_prolong.errors import ConfigError

LAUNCH_DIRECTORY = "launch"
"""In a run directory: what was submitted, and which nodes failed."""


_RECIPE = "recipe="


@dataclass(frozen=True)
class LaunchPart:
    """A script and the ranks that run it.

    Attributes:
        name: What it is called, such as the name of a run.
        script: Its file in ``scripts/``.
        arguments: What is typed after it.
        cfg: The stage whose ``cluster`` and ``launch`` say where it runs.
        num_nodes: Machines.
        ranks_per_node: Processes of each, with a GPU each.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    cfg: RunConfig
    num_nodes: int = 1
    ranks_per_node: int = 1

    @classmethod
    def of_stage(cls, cfg: RunConfig, arguments: Sequence[str]) -> LaunchPart:
        """Return the part that trains a stage on the ranks it is planned for."""
        layout = cfg.parallelism
        return cls(cfg.name, "train.py", tuple(arguments), cfg, layout.num_nodes, layout.ranks_per_node)

    @property
    def cluster(self) -> ClusterConfig:
        """Where it runs."""
        return self.cfg.cluster

    @property
    def launch(self) -> LaunchConfig:
        """What starts it."""
        return self.cfg.launch

    @property
    def job_name(self) -> str:
        """The name in one word, see ``job_name``."""
        return job_name(self.name)

    @property
    def words(self) -> list[str]:
        """The command line of each rank, without its launcher.

        Raises:
            ConfigError: If no mount of a container holds the directory of ``--config-dir``.
        """
        return ["python", self.script_path(self.script), *self._seen_arguments()]

    def _seen_arguments(self) -> list[str]:
        """Return the arguments with the directories of configurations where the ranks see them.

        Raises:
            ConfigError: If no mount of a container holds one.
        """
        cluster, arguments = self.cluster, list(self.arguments)
        for number, flag in enumerate(arguments[:-1]):
            if cluster.container_image is None or flag not in ("--config-dir", "--config-path"):
                continue
            typed = arguments[number + 1]
            seen = seen_path(cluster, typed)
            if seen is None:
                raise ConfigError(
                    f"{flag} {typed}",
                    f"no mount of cluster.container_image={cluster.container_image} holds it.",
                    f"Mount it, such as cluster.container_mounts=[{typed}:{typed}:ro], or put it below a mount.",
                )
            arguments[number + 1] = seen
        return arguments

    def script_path(self, name: str) -> str:
        """Return where a file of ``scripts/`` is on the machine or in the image."""
        root = self.cluster.container_checkout if self.cluster.container_image else str(CONFIG_DIR.parent)
        return f"{root}/scripts/{name}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank."""
        return {name: value for name, value in self.cluster.environment.items() if value is not None}

    def run_dir(self, directory: Path) -> Path:
        """Return the run directory on the host.

        Args:
            directory: What relative paths of the configuration begin at where there is no image.
        """
        if self.cluster.container_image is None:
            return Path(os.path.join(directory.absolute(), self.cfg.run_dir))
        # A volume of a name has no place on the host. What is submitted is then kept where the command is typed.
        return Path(host_path(self.cluster, self.cfg.run_dir) or directory.absolute() / self.cfg.run_dir)


def of_the_launch(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of ``cluster`` and ``launch``, which say where and how any script runs.

    >>> of_the_launch(["launch.submit=true", "+cluster.environment.A=1", "seed=1"])
    ['launch.submit=true', '+cluster.environment.A=1']
    """
    return [override for override in overrides if re.match(r"[+~]*(?:cluster|launch)[.=]", override)]


def recipe_arguments(words: Sequence[str]) -> list[str] | None:
    """Return what is typed after ``scripts/recipe.py`` for a launch of ``recipe=NAME``; None for one of a stage.

    >>> recipe_arguments(["recipe=prolong", "parent=hf:DIR", "cluster.account=a"]), recipe_arguments(["+exp=stage1"])
    (['+exp=prolong', 'parent=hf:DIR'], None)
    """
    if not any(word.startswith(_RECIPE) for word in words):
        return None
    settings = of_the_launch(words)
    return [
        word.replace(_RECIPE, "+exp=", 1) if word.startswith(_RECIPE) else word
        for word in words
        if word not in settings
    ]


def without_launch(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of ``launch``, which a stage that is running has no use for.

    >>> without_launch(["launch.submit=true", "cluster.account=a"])
    ['cluster.account=a']
    """
    return [override for override in overrides if not re.match(r"[+~]*launch[.=]", override)]


def job_name(name: str) -> str:
    """Return a name that sbatch takes as it is: it splits at blanks, ends at #, and expands % in file names.

    >>> job_name("demo/my run #2"), job_name("-x")
    ('demo-my-run-2', 'x')
    """
    return re.sub(r"[^\w.+]+", "-", name).strip("-") or "run"
