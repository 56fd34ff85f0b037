"""Manifests for Kubernetes: a TrainJob of Kubeflow Trainer (``trainer.kubeflow.org/v1alpha1``), or a JobSet.

A pod is a node. In a pod that is alone ``scripts/train.py`` starts its ranks itself, so that its exit code says why it
ended and signals reach it. Pods that are several run torchrun, which gets number and address of the node from the
TrainJob's runtime or from the JobSet.

A JobSet starts all pods again when one has failed. That resumes the stage, and what is complete ends at once. A chain
of stages is one JobSet, in which each job waits for the one before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import yaml

from nemo_prolong.config.mounts import mounts_of
from nemo_prolong.errors import (
    EXIT_INTERRUPTED,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    TrainingError,
)
from nemo_prolong.launch.parts import LaunchPart

_MASTER_PORT = 29500
_FINAL_CODES = sorted(
    {EXIT_INTERRUPTED}
    | {error.exit_code for error in (ConfigError, DataError, CheckpointError, ExportError, TrainingError)}
)
"""Exit codes after which the same command would end in the same way."""

_LONGEST_NAME = 40
"""Characters. Names of pods have 63, and JobSet adds the job, two numbers and a random part."""


class _Plain(yaml.SafeDumper):
    """Writes a list that is used twice in full, twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render_manifest(parts: Sequence[LaunchPart]) -> str:
    """Return the manifest of one stage, or of a chain that runs in this order.

    Args:
        parts: What runs. The first one says where.
    """
    if len(parts) == 1 and parts[0].launch.kubernetes.kind == "trainjob":
        manifest = _train_job(parts[0])
    else:
        manifest = _job_set(parts)
    return str(yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=120))


def object_name(name: str) -> str:
    """Return a name that Kubernetes takes, and that differs where long names differ.

    >>> object_name("demo/Stage 1")
    'demo-stage-1'
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    plain = plain if plain[0].isalpha() else f"run-{plain}"
    if len(plain) <= _LONGEST_NAME:
        return plain
    return f"{plain[: _LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _train_job(part: LaunchPart) -> dict[str, Any]:
    """Return a TrainJob. What its runtime must be told beyond the trainer is a patch of the runtime's pods."""
    settings = part.launch.kubernetes
    pod = {
        "terminationGracePeriodSeconds": part.cluster.signal_seconds,
        "volumes": _volumes(part),
        "containers": [{"name": "node", "volumeMounts": _volume_mounts(part)}],
    }
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    trainer: dict[str, Any] = {
        "image": part.cluster.container_image,
        "command": _command(part, []),
        "env": _environment(part),
        "numNodes": part.num_nodes,
        "numProcPerNode": part.ranks_per_node,
        "resourcesPerNode": _resources(part),
    }
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(part),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": settings.runtime,
            },
            "trainer": trainer,
            "runtimePatches": [{"manager": "nemo-prolong.github.io/launch", "trainingRuntimeSpec": patch}],
        },
    }


def _job_set(parts: Sequence[LaunchPart]) -> dict[str, Any]:
    """Return a JobSet with a job for each part."""
    name, settings = object_name(parts[-1].cfg.name), parts[0].launch.kubernetes
    jobs = []
    for number, part in enumerate(parts):
        job: dict[str, Any] = {"name": _job_name(parts, number), "replicas": 1}
        if number:
            job["dependsOn"] = [{"name": _job_name(parts, number - 1), "status": "Complete"}]
        jobs.append({**job, "template": {"spec": _job(part, name, job["name"])}})
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(parts[-1]),
        "spec": {
            # Ranks look for each other before their pods are ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": settings.max_restarts,
                # What the pods say cannot be mended by another start.
                "rules": [
                    {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": jobs,
        },
    }


def _job_name(parts: Sequence[LaunchPart], number: int) -> str:
    return "node" if len(parts) == 1 else f"part-{number + 1}"


def _job(part: LaunchPart, job_set: str, job: str) -> dict[str, Any]:
    """Return the job of a part: an indexed job with a pod for each node."""
    options = [
        *(f"--nnodes={part.num_nodes}", f"--nproc-per-node={part.ranks_per_node}"),
        *("--node-rank=$(JOB_COMPLETION_INDEX)", f"--master-addr={job_set}-{job}-0-0.{job_set}"),
        f"--master-port={_MASTER_PORT}",
    ]
    container = {
        "name": "node",
        "image": part.cluster.container_image,
        "command": _command(part, options),
        "env": [*_environment(part), _NODE_NUMBER],
        "resources": _resources(part),
        "volumeMounts": _volume_mounts(part),
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": part.cluster.signal_seconds,
        "containers": [container],
        "volumes": _volumes(part),
    }
    on_exit = {"containerName": "node", "operator": "In", "values": _FINAL_CODES}
    return {
        "completionMode": "Indexed",
        "completions": part.num_nodes,
        "parallelism": part.num_nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_exit}]},
        "template": {"spec": pod},
    }


_NODE_NUMBER = {
    "name": "JOB_COMPLETION_INDEX",
    "valueFrom": {
        "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"},
    },
}


def _command(part: LaunchPart, options: Sequence[str]) -> list[str]:
    """Return the command of a pod.

    Args:
        part: What it runs.
        options: Where torchrun finds the other nodes; none where variables say it.
    """
    python, *words = map(_literal, part.words)
    command = [python, *words] if part.num_nodes == 1 else ["torchrun", *options, *words]
    workdir = part.cluster.container_workdir
    # A TrainJob has no working directory of its own.
    return ["bash", "-c", 'cd "$0" && exec "$@"', workdir, *command] if workdir else command


def _literal(text: str) -> str:
    """Return a text of which Kubernetes replaces nothing. It takes $(NAME) for a variable, and $$ for a dollar sign."""
    return text.replace("$", "$$")


def _metadata(part: LaunchPart) -> dict[str, Any]:
    return {
        "name": object_name(part.cfg.name),
        "namespace": part.launch.kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": "nemo-prolong", "app.kubernetes.io/component": part.cfg.stage.value},
    }


def _environment(part: LaunchPart) -> list[dict[str, Any]]:
    """Return the variables of a container. Values of secrets come from the Secret, where it has them."""
    variables = dict(part.environment)
    if part.num_nodes > 1:
        # torchrun kills ranks that have not ended by then. It is read as if it were typed (--shutdown-timeout).
        variables["PET_SHUTDOWN_TIMEOUT"] = str(part.cluster.signal_seconds)
    plain = [{"name": name, "value": _literal(value)} for name, value in variables.items()]
    secret = part.launch.kubernetes.secret_name
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, "optional": True}}}
        for name in part.cluster.secrets
    ]
    return [*plain, *secrets]


def _resources(part: LaunchPart) -> dict[str, dict[str, str]]:
    """Return what a pod asks for. Requests that are equal to the limits keep it from being evicted first."""
    settings, cluster = part.launch.kubernetes, part.cluster
    asked = {settings.gpu_resource: str(part.ranks_per_node)}
    if settings.network_resource is not None:
        asked[settings.network_resource] = str(part.ranks_per_node)
    if cluster.cpus_per_task is not None:
        asked["cpu"] = str(cluster.cpus_per_task * part.ranks_per_node)
    if cluster.memory_per_node.rstrip("KMGT") != "0":
        # Slurm's units are powers of 1024, and without one it means MB.
        number, unit = re.fullmatch(r"(\d+)([KMGT]?)", cluster.memory_per_node).groups()  # type: ignore[union-attr]
        asked["memory"] = f"{number}{unit or 'M'}i"
    return {"limits": asked, "requests": dict(asked)}


def _volumes(part: LaunchPart) -> list[dict[str, Any]]:
    """Return the volumes: directories of the nodes and claims by name, and memory that loader processes share."""
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    for number, mount in enumerate(mounts_of(part.cluster)):
        if mount.source.startswith("/"):
            source: dict[str, Any] = {"hostPath": {"path": mount.source, "type": "Directory"}}
        else:
            source = {"persistentVolumeClaim": {"claimName": mount.source, "readOnly": mount.read_only}}
        volumes.append({"name": f"mount-{number}", **source})
    return volumes


def _volume_mounts(part: LaunchPart) -> list[dict[str, Any]]:
    mounts = mounts_of(part.cluster)
    return [
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - of the pod, where torch expects it
        *(
            {"name": f"mount-{number}", "mountPath": mount.target, "readOnly": mount.read_only}
            for number, mount in enumerate(mounts)
        ),
    ]
