"""What is in a manifest, as manifests of Kubernetes' own kinds. Imports nothing, because other environments use it."""

from __future__ import annotations

from typing import Any


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the jobs of a JobSet, or the patched pod of a TrainJob, as manifests of Kubernetes' own kinds."""
    if manifest["kind"] == "JobSet":
        jobs = manifest["spec"]["replicatedJobs"]
        return [
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": job["name"]},
                "spec": job["template"]["spec"],
            }
            for job in jobs
        ]
    spec, (patch,) = manifest["spec"], manifest["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    trainer = spec["trainer"]
    container = {
        **pod["containers"][0],
        **{key: trainer[key] for key in ("image", "command", "env")},
        "resources": trainer["resourcesPerNode"],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": manifest["metadata"]["name"]},
            "spec": {**pod, "containers": [container]},
        }
    ]
