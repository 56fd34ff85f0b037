"""Which rank this process is in a job step of Slurm, from the variables that srun gives every task. Needs no torch.

Variables of the step are read and not those of the job. ``SLURM_NTASKS`` and ``SLURM_NTASKS_PER_NODE`` are also set in
the shell of a job, and a step may have fewer tasks than its job (``env.c`` of Slurm, ``env_array_for_step``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from nemo_prolong.distributed.rank_environment import RankEnvironment, number
from nemo_prolong.errors import ConfigError

_SPECIAL_STEPS = 0xFFFFFFF0
"""Steps from this number on are no steps of srun: the batch script (0xfffffffb) and the shell of salloc (0xfffffffa).
Slurm 24.11 prints them unsigned and later releases signed (``slurm.h``)."""

_FIRST_PORT = 20_000
_PORTS = 10_000
"""Ports from 20000 to 29999. They lie below Kubernetes' node ports (30000) and Linux's ports of clients (32768)."""

_PORTS_BETWEEN_STEPS = 1_009
"""Steps of one job lie far apart. Jobs that run at the same time have numbers close to each other."""

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def slurm_rank(environment: Mapping[str, str]) -> RankEnvironment | None:
    """Return the place of this process in its job step, or None where it is no rank of several.

    The shell of a batch script or of ``salloc`` is none, and the only task of a step is alone.

    Raises:
        ConfigError: If the variables contradict each other, nodes have different numbers of tasks, or ranks are not
            numbered node by node.
    """
    if not _in_a_step(environment):
        return None
    tasks = number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS", 1)
    if tasks == 1:
        return None
    per_node = _tasks_per_node(environment, tasks)
    place = RankEnvironment(
        rank=number(environment, "SLURM_PROCID"),
        local_rank=number(environment, "SLURM_LOCALID"),
        world_size=tasks,
        local_world_size=per_node,
        master_address=environment.get("MASTER_ADDR") or _address(environment, several_nodes=tasks > per_node),
        master_port=number(environment, "MASTER_PORT", _port(environment)),
    )
    _check_numbering(environment, place)
    return place


def _in_a_step(environment: Mapping[str, str]) -> bool:
    if not environment.get("SLURM_PROCID"):
        return False
    step = environment.get("SLURM_STEP_ID", "")
    # A negative number is a special step too.
    return step.isdigit() and int(step) < _SPECIAL_STEPS


def task_counts(text: str) -> list[int]:
    """Return the tasks of every node from Slurm's compact form.

    >>> task_counts("8(x2),4")
    [8, 8, 4]

    Raises:
        ConfigError: If it is not of that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={text}",
                "is not what Slurm writes, such as 8(x2),4.",
                "Leave it to srun, or unset it.",
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _tasks_per_node(environment: Mapping[str, str], tasks: int) -> int:
    """Return how many tasks every node has."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if environment.get(n)), None)
    if name is None:
        per_node = number(environment, "SLURM_NTASKS_PER_NODE", 0) or tasks
        counts = [per_node] * max(tasks // per_node, 1)
        name, text = "SLURM_NTASKS_PER_NODE", str(per_node)
    else:
        text = environment[name]
        counts = task_counts(text)
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{name}={text}",
            "nodes have different numbers of tasks, and the layout needs as many ranks on every node.",
            "Ask for tasks per node, e.g. srun --ntasks-per-node=8, or exclude the odd node.",
        )
    if sum(counts) != tasks:
        raise ConfigError(
            f"{name}={text}",
            f"contradicts the {tasks} tasks that the step has.",
            "Start the step with srun --nodes=N --ntasks-per-node=M, and leave SLURM_* variables to Slurm.",
        )
    return counts[0]


def _check_numbering(environment: Mapping[str, str], place: RankEnvironment) -> None:
    node = number(environment, "SLURM_NODEID", place.node_rank)
    if place.is_consistent() and node == place.node_rank:
        return
    raise ConfigError(
        f"SLURM_PROCID={place.rank} SLURM_LOCALID={place.local_rank} SLURM_NODEID={node}",
        f"of {place.world_size} tasks, {place.local_world_size} on every node, this one has another number. Ranks must "
        "be numbered node by node, so that those of one tensor-parallel group share a node.",
        "Start them with srun --distribution=block.",
    )


def _address(environment: Mapping[str, str], several_nodes: bool) -> str:
    """Return the first node of the step, which rank 0 is on.

    ``SLURM_LAUNCH_NODE_IPADDR`` is the node that srun was typed on, a login node under salloc, say.
    """
    if not several_nodes:
        return "127.0.0.1"
    name = next((n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if environment.get(n)), None)
    if name is None:
        raise ConfigError(
            "SLURM_STEP_NODELIST=",
            "says where rank 0 can be reached, and is not set.",
            "Leave it to srun, or set MASTER_ADDR to the first node.",
        )
    return first_node(environment[name])


def first_node(nodes: str) -> str:
    """Return the first node of a list as Slurm writes it.

    >>> first_node("gpu-[007-009,012],login"), first_node("rack[1-2]n[3,5]")
    ('gpu-007', 'rack1n3')
    """
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodes).split(",")[0]


def _port(environment: Mapping[str, str]) -> int:
    job, step = number(environment, "SLURM_JOB_ID", 0), number(environment, "SLURM_STEP_ID", 0)
    return _FIRST_PORT + (job + _PORTS_BETWEEN_STEPS * step) % _PORTS
