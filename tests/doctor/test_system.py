"""Shared memory, limits, processors, host memory and adapters: good ones pass, and bad ones are explained."""

from dataclasses import replace

import pytest

from nemo_prolong.doctor.checks.system import system_findings
from nemo_prolong.doctor.facts import Limits, Volume
from nemo_prolong.doctor.finding import Level
from tests.support.recorded_node import GIB, cpu_node, h100_node, said, stage

STAGE2 = stage("stage2")
SFT = stage("sft")
MIB = 2**20


def bad(machine, cfg=STAGE2, ranks_here=1):
    """Return the one finding that is not well."""
    (finding,) = (finding for finding in system_findings(machine, cfg, ranks_here) if finding.level is not Level.OK)
    return finding


def shared_memory(total_bytes, free_bytes):
    return Volume("/dev/shm", total_bytes, free_bytes, "tmpfs")


def ports(states):
    return tuple(
        replace(port, state=state, active=state == "ACTIVE")
        for port, state in zip(h100_node().ports, states, strict=True)
    )


def test_a_node_made_for_it_has_nothing_to_mend():
    assert [(finding.name, finding.level, finding.what) for finding in system_findings(h100_node(), STAGE2)] == [
        ("shared_memory", Level.OK, "/dev/shm has 990.0 GiB free of 1000.0 GiB."),
        ("limits", Level.OK, "limits of files, processes and locked memory are high enough."),
        ("cpus", Level.OK, "224 processors for this process."),
        ("host_memory", Level.OK, "1.9 TiB of host memory are available; a save in the background takes 13.1 GiB."),
        ("fabric", Level.OK, "8 ports active (400 Gb/s InfiniBand)."),
    ]


def test_a_laptop_is_enough_for_the_miniature():
    findings = system_findings(cpu_node(), stage("mini/base"))
    assert {finding.level for finding in findings} == {Level.OK}


def test_shared_memory_that_rows_do_not_fit_in():
    finding = bad(h100_node(shared_memory=shared_memory(64 * MIB, 64 * MIB)))
    assert finding.level is Level.NO_GO
    # 8 ranks of one loader process with 3 rows of 512K * 28 bytes, and 64 MiB of NCCL's.
    assert said(finding) == (
        "/dev/shm has 64.0 MiB free of 64.0 MiB, the stage takes up to 848.0 MiB.\n"
        "Loader processes hand over rows there, and NCCL its buffers; a full one ends them with SIGBUS.\n"
        "Start the container with --ipc=host or --shm-size=64g; in Kubernetes mount an emptyDir of medium Memory."
    )


def test_shared_memory_of_the_default_size_is_noticed_without_a_stage():
    finding = bad(h100_node(shared_memory=shared_memory(64 * MIB, 64 * MIB)), cfg=None)
    assert (finding.level, finding.what) == (
        Level.WARNING,
        "/dev/shm has 64.0 MiB free of 64.0 MiB, which is Docker's default.",
    )


def test_no_shared_memory_at_all():
    finding = bad(h100_node(shared_memory=None))
    assert (finding.level, finding.what) == (Level.NO_GO, "there is no /dev/shm.")


def test_few_open_files():
    finding = bad(h100_node(limits=Limits(1024, 524288, None, None)))
    assert said(finding) == (
        "ulimit -n is 1024 (it may be raised to 524288), and up to 4096 files and sockets are open.\n"
        "Shards, sockets of ranks and log files then fail with: Too many open files.\n"
        "Put ulimit -n 4096 into the job, or start the container with --ulimit nofile=4096."
    )
    assert finding.level is Level.WARNING


def test_open_files_grow_with_the_ranks():
    many = stage("stage2", "parallelism.num_nodes=128", "train.global_batch_size=16")
    finding = bad(h100_node(limits=Limits(4096, 4096, None, None)), many)
    assert finding.what == "ulimit -n is 4096 (it may be raised to 4096), and up to 5120 files and sockets are open."


def test_few_processes():
    finding = bad(h100_node(limits=Limits(1048576, 1048576, None, 2048)))
    assert said(finding) == (
        "2048 processes and threads are allowed, and the node starts up to 4096.\n"
        "Loader processes and the threads of CUDA and NCCL then fail with: Resource temporarily unavailable.\n"
        "Put ulimit -u 4096 into the job, or start the container with --pids-limit=4096."
    )


LOCKED = Limits(1048576, 1048576, 64 * 1024, None)


def test_memory_that_cannot_be_locked_stops_a_stage_on_several_nodes():
    finding = bad(h100_node(limits=LOCKED))
    assert finding.level is Level.NO_GO
    assert said(finding) == (
        "ulimit -l is 64.0 KiB, and this node has InfiniBand or RoCE.\n"
        "NCCL locks its buffers for the adapter, and fails with: ibv_reg_mr failed, or: Cannot allocate memory.\n"
        "Start the container with --ulimit memlock=-1, or set PropagateResourceLimitsExcept=MEMLOCK in slurm.conf."
    )


def test_memory_that_cannot_be_locked_is_a_warning_on_one_node():
    assert bad(h100_node(limits=LOCKED), SFT).level is Level.WARNING


def test_memory_need_not_be_locked_without_an_adapter():
    assert all(finding.level is Level.OK for finding in system_findings(h100_node(limits=LOCKED, ports=()), SFT))


def test_few_processors():
    finding = bad(h100_node(cpus=8))
    assert said(finding) == (
        "8 processors for this process, and each node's ranks and their loader processes are 16.\n"
        "Steps then wait for rows and for kernels that are launched late.\n"
        "Ask for more: srun --cpus-per-task, docker run --cpus, resources.requests.cpu; or lower data.num_workers."
    )


def test_a_task_of_slurm_needs_processors_of_its_own_only():
    assert all(finding.level is Level.OK for finding in system_findings(h100_node(cpus=8), STAGE2, ranks_here=8))
    finding = bad(h100_node(cpus=1), ranks_here=8)
    assert finding.what == "1 processor for this process, and each rank and its loader processes are 2."


def test_host_memory_that_a_save_does_not_fit_in():
    finding = bad(h100_node(available_memory_bytes=8 * GIB))
    assert finding.level is Level.NO_GO
    assert said(finding) == (
        "8.0 GiB of host memory are available, and a save in the background takes 13.1 GiB on each node.\n"
        "The kernel ends a rank at the first save.\n"
        "Ask for the node's memory (srun --mem=0, resources.requests.memory), or set checkpoint.async_save=false."
    )


def test_a_save_that_training_waits_for_takes_no_host_memory():
    cfg = stage("stage2", "checkpoint.async_save=false")
    assert all(finding.level is Level.OK for finding in system_findings(h100_node(available_memory_bytes=GIB), cfg))


def test_no_adapter_between_nodes():
    finding = bad(h100_node(ports=()))
    assert (finding.name, finding.level) == ("fabric", Level.WARNING)
    assert said(finding) == (
        "there is no InfiniBand or RoCE adapter.\n"
        "NCCL then talks TCP between nodes, ten times slower or worse: context parallelism across nodes waits.\n"
        "Mount /dev/infiniband into the container, use nodes with a fabric, or your cloud's plugin of NCCL."
    )


def test_one_node_needs_no_adapter():
    (finding,) = (finding for finding in system_findings(h100_node(ports=()), SFT) if finding.name == "fabric")
    assert (finding.level, finding.what) == (Level.OK, "no InfiniBand or RoCE port is active; one node needs none.")


def test_a_port_that_is_down_is_named():
    finding = bad(h100_node(ports=ports(["ACTIVE"] * 7 + ["DOWN"])))
    assert (finding.name, finding.level) == ("fabric_ports", Level.WARNING)
    assert said(finding) == (
        "1 port of 8 not active: mlx5_7:1 (DOWN).\n"
        "Ranks of this node share the others, so the whole job is slower.\n"
        "Have them looked at (ibstat), or name the good ones in NCCL_IB_HCA."
    )


@pytest.mark.parametrize("state", ["DOWN", "INIT"])
def test_adapters_whose_ports_are_all_down(state):
    findings = system_findings(h100_node(ports=ports([state] * 8)), STAGE2)
    assert [finding.what for finding in findings if finding.level is not Level.OK] == [
        "no InfiniBand or RoCE port is active.",
        f"8 ports of 8 not active: {', '.join(f'mlx5_{number}:1 ({state})' for number in range(8))}.",
    ]
