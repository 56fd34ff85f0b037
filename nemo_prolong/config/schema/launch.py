"""How ``scripts/launch.py`` starts a stage or a chain of stages: where, and whether it only shows what it would do."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from nemo_prolong.config.schema.base import Name, Section

AbsolutePath = Annotated[Name, Field(pattern=r"^/")]
"""A path in a container. A relative one would begin at a directory that only the image knows."""

MountText = Annotated[Name, Field(pattern=r"^[^:,\s]+:/[^:,\s]*(:(ro|rw))?$")]
"""SOURCE:TARGET or SOURCE:TARGET:ro. pyxis splits a list of mounts at commas, and each at colons."""

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
"""Name of a variable of the environment, as a shell takes it."""

SbatchOption = Annotated[Name, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@+/=|&*\[\]-]+)?$")]
"""An option of sbatch on its own line: it splits a line at blanks and ends it at #."""

KubernetesName = Annotated[Name, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
"""Name of an object of Kubernetes: lower case, digits, dots and hyphens."""

ResourceName = Annotated[Name, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$")]
"""A resource that a device plugin offers, such as nvidia.com/gpu."""


class LaunchTarget(StrEnum):
    """What starts the ranks."""

    SLURM = "slurm"
    KUBERNETES = "kubernetes"
    DOCKER = "docker"
    LOCAL = "local"


class KubernetesConfig(Section):
    """What only Kubernetes asks for; image, mounts and environment are those of ``cluster``."""

    kind: Literal["trainjob", "jobset"] = "trainjob"
    """Kubeflow's TrainJob, or a JobSet, which needs no Kubeflow. A chain of stages is always a JobSet."""
    namespace: KubernetesName = "default"
    """Namespace of all objects."""
    runtime: KubernetesName = "torch-distributed"
    """ClusterTrainingRuntime of a TrainJob; its container is named node."""
    secret_name: KubernetesName = "nemo-prolong"  # noqa: S105 - of an object
    """Secret that holds the values of ``cluster.secrets``, under the names of the variables."""
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """What a GPU is called; each pod asks for one per rank."""
    network_resource: ResourceName | None = None
    """What an RDMA device is called, such as rdma/ib; each pod asks for one per rank. null asks for none."""
    max_restarts: Annotated[int, Field(ge=0, le=10**6)] = 20
    """With jobset: how often all pods are started again after a failure or an interruption, over the whole stage."""


class LaunchConfig(Section):
    """How ``scripts/launch.py`` starts a stage. Training does not read it."""

    target: LaunchTarget = LaunchTarget.SLURM
    """What starts the ranks: a Slurm job, pods of Kubernetes, a Docker container or a process of this machine."""
    dry_run: bool | None = None
    """Print the files and write nothing; null is true unless submit is. false writes them into the run directory."""
    submit: bool = False
    """Write the files into the run directory and submit them."""
    kubernetes: KubernetesConfig = KubernetesConfig()

    @property
    def only_prints(self) -> bool:
        """Whether nothing is written."""
        return not self.submit if self.dry_run is None else self.dry_run
