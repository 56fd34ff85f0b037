"""Rules of what is launched: a container sees its files, a target has what it needs, no secret is written down."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping

from nemo_prolong.config.addresses import HF_PREFIX, is_address
from nemo_prolong.config.commands import typed
from nemo_prolong.config.mounts import container_path, mount_of, mounts_of
from nemo_prolong.config.schema import ClusterConfig, LaunchTarget, RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.redaction import names_a_secret

_EXAMPLE = "cluster.container_mounts=[/shared/project:/project] cluster.container_workdir=/project"


def _read_files(cfg: RunConfig) -> dict[str, str]:
    """Return what must be there before a job: settings as they are typed, and the path that each names."""
    files = {}
    if cfg.parent is not None:
        files[typed("parent", cfg.parent)] = cfg.parent.removeprefix(HF_PREFIX)
    if not is_address(cfg.data.root):
        files[typed("data.root", cfg.data.root)] = cfg.data.root
    if is_address(cfg.data.root) or posixpath.isabs(cfg.data.tokenizer):
        files[typed("data.tokenizer", cfg.data.tokenizer)] = cfg.data.tokenizer
    return files


def _container(cfg: RunConfig) -> list[ConfigError]:
    written, read = cfg.run_dir, _read_files(cfg)
    found = files_in_image(cfg.cluster, {typed("runs_dir", cfg.runs_dir): written}, written=True)
    return [*found, *files_in_image(cfg.cluster, read, written=False)]


def files_in_image(cluster: ClusterConfig, files: Mapping[str, str], *, written: bool) -> list[ConfigError]:
    """Refuse files inside the image, which every node has a copy of and which is gone when the job ends.

    Args:
        cluster: Where a stage runs.
        files: Settings as they are typed, and the path that each names.
        written: Whether they are written.
    """
    image, found = cluster.container_image, []
    for what, path in files.items() if image is not None else ():
        inside = container_path(cluster, path)
        mount = None if inside is None else mount_of(mounts_of(cluster), inside)
        if mount is None:
            rule = f"{path} would lie inside cluster.container_image={image}, which is a copy of its own on every node"
            why = " and is gone when the job ends."
            remedy = f"Mount a shared directory and name paths in it, such as {_EXAMPLE}."
            found.append(ConfigError(what, rule + why, remedy))
        elif mount.read_only and written:
            rule = f"{path} lies in {mount.target}, which cluster.container_mounts makes read-only."
            found.append(ConfigError(what, rule, "Mount it without :ro, or write to another mount."))
    return found


def _mount_sources(cfg: RunConfig) -> list[ConfigError]:
    if cfg.launch.target is not LaunchTarget.SLURM:
        return []
    volumes = [mount.source for mount in mounts_of(cfg.cluster) if not posixpath.isabs(mount.source)]
    rule = "pyxis mounts directories of the host, which are named by absolute paths."
    remedy = "Write /PATH:TARGET. Names of volumes are for launch.target=docker and kubernetes."
    return [ConfigError(f"cluster.container_mounts={volume}:...", rule, remedy) for volume in volumes]


def _target(cfg: RunConfig) -> list[ConfigError]:
    """Refuse a target that has no image, or fewer machines than are planned."""
    target, found = cfg.launch.target, []
    if target in (LaunchTarget.DOCKER, LaunchTarget.KUBERNETES) and cfg.cluster.container_image is None:
        found.append(
            ConfigError(
                f"launch.target={target}", "runs an image, and none is named.", "Set cluster.container_image=IMAGE."
            )
        )
    if target in (LaunchTarget.DOCKER, LaunchTarget.LOCAL) and cfg.parallelism.num_nodes > 1:
        found.append(
            ConfigError(
                f"launch.target={target}",
                f"is one machine, and parallelism.num_nodes={cfg.parallelism.num_nodes}.",
                "Set launch.target=slurm or kubernetes, or a parallelism of one node, such as h100_8_tp4_cp2.",
            )
        )
    if cfg.launch.submit and cfg.launch.dry_run:
        rule = "a dry run submits nothing."
        found.append(ConfigError("launch.dry_run=true launch.submit=true", rule, "Leave launch.dry_run out."))
    return found


def _secrets(cfg: RunConfig) -> list[ConfigError]:
    """Refuse the value of a secret, which would be in the job file."""
    return [
        ConfigError(
            f"cluster.environment.{name}",
            "a secret in the configuration is written into job files and records.",
            f"Add {name} to cluster.secrets, and set it in the environment (in the Secret, with Kubernetes).",
        )
        for name, value in cfg.cluster.environment.items()
        if value is not None and (names_a_secret(name) or name in cfg.cluster.secrets)
    ]


LAUNCH_RULES: tuple[Callable[[RunConfig], list[ConfigError]], ...] = (_container, _mount_sources, _target, _secrets)
"""Rules of a job, in the order in which they are reported."""
