"""A process finds out which rank it is from what torchrun or srun gave it, and refuses what contradicts itself."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.distributed.launched import refuse_several_ranks, take_place
from nemo_prolong.distributed.rank_environment import VARIABLES, RankEnvironment
from nemo_prolong.distributed.slurm_step import first_node, slurm_rank, task_counts
from nemo_prolong.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}

# What Slurm 24.11 gives the shell of a batch script of 2 nodes with 4 tasks each, and of what kind it is.
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu-[007-008]",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
BATCH_SHELL = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu-[007-008]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TASK = {**JOB, **STEP, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as error:
        take_place(environment)
    return str(error.value)


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


# torchrun.


def test_the_variables_of_torchrun_are_taken_as_they_are() -> None:
    environment = dict(TORCHRUN)
    place = take_place(environment)
    assert place == RankEnvironment(5, 1, 8, 4, "node1", 29500)
    assert (place.num_nodes, place.node_rank) == (2, 1)
    assert environment == TORCHRUN == place.variables()


def test_torchrun_goes_before_the_srun_that_started_it() -> None:
    one_task_per_node = {**TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert take_place({**one_task_per_node, **TORCHRUN}) == RankEnvironment(5, 1, 8, 4, "node1", 29500)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": ""},
        {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        # A platform that knows of one container only.
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"},
    ],
)
def test_a_process_without_a_launcher_is_none(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert take_place(environment) is None
    assert environment == before
    assert RankEnvironment.current(environment) == RankEnvironment(0, 0, 1, 1)


def test_one_rank_of_torchrun_is_a_rank() -> None:
    one = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    place = take_place(one)
    assert place is not None and place.world_size == 1


def test_variables_that_are_missing_are_named() -> None:
    assert refusal(without(TORCHRUN, "LOCAL_WORLD_SIZE")) == (
        "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 MASTER_ADDR=node1 MASTER_PORT=29500: LOCAL_WORLD_SIZE is missing. "
        "Start the ranks by torchrun or srun, which set or replace all of them, or set all of them."
    )
    assert ": LOCAL_RANK and LOCAL_WORLD_SIZE are missing. " in refusal(
        without(TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    assert refusal({"RANK": "1"}).startswith("RANK=1: LOCAL_RANK and WORLD_SIZE and ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "8"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "0"},
        # Nodes with 3, 3 and 2 ranks.
        {"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "2"},
    ],
)
def test_variables_that_contradict_each_other_are_refused(wrong: dict[str, str]) -> None:
    given_values = {**TORCHRUN, **wrong}
    names = " ".join(f"{name}={given_values[name]}" for name in VARIABLES[:4])
    assert refusal(given_values) == (
        f"{names}: every machine must have as many ranks, numbered in the order of the machines. "
        "Start as many ranks on every machine, or unset these variables."
    )


def test_a_variable_that_is_no_number_is_named() -> None:
    assert refusal({**TORCHRUN, "WORLD_SIZE": "-8"}) == (
        "WORLD_SIZE=-8: is not a whole number. Leave it to the launcher (torchrun or srun), or unset it."
    )


# srun.


def test_a_task_of_srun_is_a_rank_with_the_variables_of_torchrun() -> None:
    environment = dict(TASK)
    place = take_place(environment)
    assert place == RankEnvironment(5, 1, 8, 4, "gpu-007", 20000 + 123456 % 10000)
    assert {name: environment[name] for name in VARIABLES} == place.variables()
    # Again, as the scripts of a script would find it.
    assert take_place(environment) == place


def test_an_address_and_a_port_of_the_user_are_kept() -> None:
    place = slurm_rank({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert place is not None and (place.master_address, place.master_port) == ("10.0.0.7", 1234)


@pytest.mark.parametrize(
    "environment",
    [
        # The shells of sbatch and salloc: of the job, not of a rank. Releases differ in what the number of the step is.
        JOB,
        BATCH_SHELL,
        {**BATCH_SHELL, "SLURM_STEP_ID": "-5"},
        {**BATCH_SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        {**BATCH_SHELL, "SLURM_STEP_ID": "4294967291"},
        # srun --pty bash, or one task that has all GPUs of a node.
        {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
)
def test_the_shell_of_a_job_is_no_rank(environment: dict[str, str]) -> None:
    environment = dict(environment)
    before = dict(environment)
    assert take_place(environment) is None
    assert environment == before


def test_the_step_counts_where_its_job_is_larger() -> None:
    smaller = {**TASK, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3"}
    place = slurm_rank(smaller)
    assert place is not None and (place.world_size, place.local_world_size) == (4, 2)


def test_the_job_counts_where_the_step_says_nothing() -> None:
    few = without(TASK, *(name for name in STEP if name != "SLURM_STEP_ID"))
    assert slurm_rank(few) == slurm_rank(TASK)
    assert slurm_rank(without(few, "SLURM_TASKS_PER_NODE", "SLURM_NODEID")) == slurm_rank(TASK)


def test_ranks_of_one_node_meet_at_its_own_address() -> None:
    one_node = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "SLURM_NODEID": "0"}
    place = slurm_rank(one_node)
    assert place is not None and place.master_address == "127.0.0.1"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "5,3"},
            "SLURM_STEP_TASKS_PER_NODE=5,3: nodes have different numbers of tasks, and the layout needs as many ranks "
            "on every node. Ask for tasks per node, e.g. srun --ntasks-per-node=8, or exclude the odd node.",
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"},
            "SLURM_STEP_TASKS_PER_NODE=4(x3): contradicts the 8 tasks that the step has. "
            "Start the step with srun --nodes=N --ntasks-per-node=M, and leave SLURM_* variables to Slurm.",
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "4x2"},
            "SLURM_STEP_TASKS_PER_NODE=4x2: is not what Slurm writes, such as 8(x2),4. Leave it to srun, or unset it.",
        ),
        (
            # srun --distribution=cyclic.
            {"SLURM_LOCALID": "2"},
            "SLURM_PROCID=5 SLURM_LOCALID=2 SLURM_NODEID=1: of 8 tasks, 4 on every node, this one has another number. "
            "Ranks must be numbered node by node, so that those of one tensor-parallel group share a node. "
            "Start them with srun --distribution=block.",
        ),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8 SLURM_LOCALID=1 SLURM_NODEID=1: of 8 tasks, 4 on every node, this "),
        ({"SLURM_NODEID": "0"}, "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NODEID=0: of 8 tasks, 4 on every node, this "),
        (
            {"SLURM_LOCALID": ""},
            "SLURM_LOCALID=: is not a whole number. Leave it to the launcher (torchrun or srun), or unset it.",
        ),
        (
            {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
            "SLURM_STEP_NODELIST=: says where rank 0 can be reached, and is not set. "
            "Leave it to srun, or set MASTER_ADDR to the first node.",
        ),
    ],
)
def test_a_task_that_slurm_did_not_start_so_is_refused(wrong: dict[str, str], message: str) -> None:
    assert refusal({**TASK, **wrong}).startswith(message)


def test_ports_differ_between_jobs_and_steps() -> None:
    def port(job: int, step: int = 0) -> int:
        place = slurm_rank({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        assert place is not None
        return place.master_port

    jobs = [port(number) for number in range(98_000, 100_500)]
    assert len(set(jobs)) == len(jobs)
    assert min(jobs) >= 20_000 and max(jobs) < 30_000
    assert len({port(7, step) for step in range(9)} | {port(8, step) for step in range(9)}) == 18


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 4)), min_size=1, max_size=5))
def test_compact_task_counts_are_read_back(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}" if nodes == 1 else f"{tasks}(x{nodes})" for tasks, nodes in groups)
    assert task_counts(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-8]", "node1"),
        ("gpu-[007,009-012],x1", "gpu-007"),
        ("gpu[3]", "gpu3"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]n[3,5-6].site", "rack1n3.site"),
    ],
)
def test_the_first_node_of_a_list_is_where_rank_0_is(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


# Scripts that are one process, and what is imported.


def test_a_script_of_one_process_refuses_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    refuse_several_ranks("scripts/export.py")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    message = (
        "scripts/export.py: is one process, and 8 were started. Start it without torchrun: python scripts/export.py. "
        "Under Slurm, start one task: srun --nodes=1 --ntasks=1."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        refuse_several_ranks("scripts/export.py")


def test_finding_out_imports_no_torch() -> None:
    program = (
        "import sys; from nemo_prolong.distributed import devices, launched, processes; "
        "launched.take_place({}); sys.exit('torch' in sys.modules)"
    )
    done: Any = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 0
