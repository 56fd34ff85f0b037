"""Which files of the host a container sees, and where."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from nemo_prolong.config.schema import ClusterConfig


@dataclass(frozen=True)
class Mount:
    """A directory or volume of the host in a container.

    Attributes:
        source: What is mounted: an absolute path, or the name of a volume.
        target: Where it is in the container.
        read_only: Whether the container may only read it.
    """

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Mount:
        """Return the mount of SOURCE:TARGET or SOURCE:TARGET:ro.

        >>> Mount.parse("/shared:/data:ro")
        Mount(source='/shared', target='/data', read_only=True)
        """
        source, target, *flags = text.split(":")
        return cls(source, target, flags == ["ro"])

    def holds(self, path: str) -> bool:
        """Return whether an absolute path of the container lies in it."""
        return PurePosixPath(path).is_relative_to(posixpath.normpath(self.target))


def container_path(cluster: ClusterConfig, path: str) -> str | None:
    """Return the absolute path in the container of a path of the configuration, None where only the image knows it."""
    if posixpath.isabs(path):
        return posixpath.normpath(path)
    workdir = cluster.container_workdir
    return None if workdir is None else posixpath.normpath(posixpath.join(workdir, path))


def mount_of(mounts: Sequence[Mount], path: str) -> Mount | None:
    """Return the mount that an absolute path of the container lies in, the innermost of several."""
    return max((mount for mount in mounts if mount.holds(path)), key=lambda mount: len(mount.target), default=None)


def mounts_of(cluster: ClusterConfig) -> list[Mount]:
    """Return the mounts of a configuration."""
    return [Mount.parse(text) for text in cluster.container_mounts]


def host_path(cluster: ClusterConfig, path: str) -> str | None:
    """Return where a path of the container is on the host; None where it is in the image or in a named volume."""
    inside = container_path(cluster, path)
    mount = None if inside is None else mount_of(mounts_of(cluster), inside)
    if inside is None or mount is None or not posixpath.isabs(mount.source):
        return None
    return posixpath.normpath(posixpath.join(mount.source, posixpath.relpath(inside, mount.target)))


def seen_path(cluster: ClusterConfig, path: str) -> str | None:
    """Return where an absolute path of the host is in a container, by the innermost mount; None where it is not.

    >>> seen_path(ClusterConfig(container_mounts=["/shared/me:/me"]), "/shared/me/conf")
    '/me/conf'
    """
    mounts = [mount for mount in mounts_of(cluster) if posixpath.isabs(mount.source)]
    holding = [mount for mount in mounts if PurePosixPath(path).is_relative_to(posixpath.normpath(mount.source))]
    if not holding:
        return None
    mount = max(holding, key=lambda mount: len(mount.source))
    return posixpath.normpath(posixpath.join(mount.target, posixpath.relpath(path, mount.source)))
