"""The variables by which launchers tell ranks who they are, for tests that start ranks themselves."""

from __future__ import annotations

import os

PREFIXES = ("SLURM_", "TORCHELASTIC_", "PET_")
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_launcher() -> dict[str, str]:
    """Return the environment of this process without what a launcher may have set, threads included."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*TORCHRUN, "OMP_NUM_THREADS") and not name.startswith(PREFIXES)
    }


def slurm_task(rank: int, nodes: int, tasks_per_node: int, job: int) -> dict[str, str]:
    """Return what Slurm gives a task of ``srun``, in a job of as many nodes and tasks as its step.

    The node list is one that names this machine. Slurm's is of host names.
    """
    tasks, counts = nodes * tasks_per_node, f"{tasks_per_node}(x{nodes})"
    node = rank // tasks_per_node
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NAME": "stage",
        "SLURM_JOB_NODELIST": "localhost,node2",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_TASKS_PER_NODE": counts,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost,node2",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": counts,
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % tasks_per_node),
        "SLURM_NODEID": str(node),
        "SLURM_GTIDS": ",".join(str(node * tasks_per_node + local) for local in range(tasks_per_node)),
    }
