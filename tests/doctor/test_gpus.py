"""Each thing that can be wrong with the GPUs of a node is a finding that says why and how to mend it."""

from dataclasses import replace

import pytest

from nemo_prolong.doctor.checks.gpus import gpu_findings
from nemo_prolong.doctor.facts import NvidiaFacts
from nemo_prolong.doctor.finding import Level
from tests.support.recorded_node import cpu_node, h100_node, said, stage

STAGE2 = stage("stage2")


def with_gpu(number=3, **changes):
    """Return the node with one GPU that is otherwise."""
    node = h100_node()
    gpus = tuple(replace(gpu, **changes) if gpu.index == number else gpu for gpu in node.gpus)
    return replace(node, nvidia=replace(node.nvidia, gpus=gpus))


def with_driver(**changes):
    node = h100_node()
    return replace(node, nvidia=replace(node.nvidia, **changes))


def bad(machine, cfg=STAGE2):
    """Return the one finding that is not well."""
    (finding,) = (finding for finding in gpu_findings(machine, cfg) if finding.level is not Level.OK)
    return finding


def test_a_whole_node_has_nothing_to_mend():
    assert [(finding.name, finding.level, finding.what) for finding in gpu_findings(h100_node(), STAGE2)] == [
        ("gpus", Level.OK, "8 GPUs here (NVIDIA H100 80GB HBM3)."),
        ("driver", Level.OK, "driver 580.95.05 for CUDA 13.0, torch uses 8 GPUs."),
        ("nvlink", Level.OK, "8 GPUs joined by NVLink, 18 links each."),
    ]


def test_a_full_size_stage_needs_gpus():
    finding = bad(cpu_node())
    assert finding.level is Level.NO_GO
    assert said(finding) == (
        "there is no NVIDIA driver (no nvidia-smi), and the stage is planned for 8 GPUs on each node.\n"
        "Its kernels run on GPUs only, and its model does not fit elsewhere.\n"
        "Start the doctor on a GPU node (srun, kubectl exec), give the container its GPUs (docker run --gpus all), or "
        "try the recipe in miniature: +exp=mini/base."
    )


def test_a_full_size_stage_needs_gpus_with_torchs_kernels_too():
    assert bad(cpu_node(), stage("stage2", "precision.backend=torch")).level is Level.NO_GO


@pytest.mark.parametrize("cfg", [None, stage("mini/base"), stage("mini/base", "precision=bf16")])
def test_the_miniature_and_a_login_node_need_none(cfg):
    (finding,) = gpu_findings(cpu_node(), cfg)
    assert (finding.level, finding.what) == (
        Level.OK,
        "there is no NVIDIA driver (no nvidia-smi); the CPU runs stages with torch's kernels.",
    )


def test_a_driver_without_gpus_is_told_from_none():
    finding = bad(replace(cpu_node(), nvidia=NvidiaFacts("580.95.05", (13, 0), ())))
    assert finding.what == "nvidia-smi lists no GPU, and the stage is planned for 8 GPUs on each node."


def test_a_gpu_that_has_dropped_off_is_missing():
    finding = bad(with_driver(gpus=h100_node().gpus[:7]))
    assert (finding.name, finding.level) == ("gpus", Level.NO_GO)
    assert said(finding) == (
        "7 GPUs here (NVIDIA H100 80GB HBM3), and parallelism.ranks_per_node=8.\n"
        "Each rank takes a GPU of its own; ranks without one fail when they start.\n"
        "Ask the job for 8 GPUs a node, or choose a layout for 7: parallelism.ranks_per_node=7. nvidia-smi -L on the "
        "node shows whether one has dropped off the bus."
    )


@pytest.mark.parametrize(
    ("changes", "name", "level", "what", "remedy"),
    [
        (
            {"name": "NVIDIA H200", "memory_bytes": 143771 * 2**20},
            "gpu_kinds",
            Level.WARNING,
            "the node has GPUs of several kinds: NVIDIA H100 80GB HBM3 (79.6 GiB) and NVIDIA H200 (140.4 GiB).",
            "CUDA_VISIBLE_DEVICES",
        ),
        ({"mig": True}, "mig", Level.NO_GO, "GPU 3 is divided into MIG instances.", "nvidia-smi -i 3 -mig 0"),
        (
            {"uncorrected_errors": 2},
            "gpu_memory_errors",
            Level.NO_GO,
            "GPU 3 is reporting memory errors that ECC could not correct (2).",
            "sbatch --exclude",
        ),
        (
            {"used_bytes": 60 * 2**30},
            "gpu_memory_used",
            Level.WARNING,
            "GPU 3 is in use by another process (60.0 GiB).",
            "nvidia-smi lists the processes",
        ),
        (
            {"compute_mode": "Prohibited"},
            "compute_mode",
            Level.NO_GO,
            "GPU 3 is in compute mode Prohibited.",
            "nvidia-smi -i 3 -c DEFAULT",
        ),
        ({"persistent": False}, "persistence", Level.WARNING, "GPU 3 is without persistence mode.", "persistenced"),
    ],
)
def test_what_is_wrong_with_one_gpu_is_said_of_that_one(changes, name, level, what, remedy):
    finding = bad(with_gpu(**changes))
    assert (finding.name, finding.level, finding.what) == (name, level, what)
    assert remedy in finding.remedy
    assert finding.why


def test_gpus_of_less_memory_than_the_layouts_are_for():
    gpus = tuple(replace(gpu, memory_bytes=40960 * 2**20) for gpu in h100_node().gpus)
    finding = bad(with_driver(gpus=gpus))
    assert finding.what == "GPUs 0, 1, 2, 3, 4, 5, 6, 7 are smaller than 80 GB (40.0 GiB)."


def test_a_driver_older_than_the_cuda_of_torch():
    finding = bad(with_driver(driver="535.183.01", cuda=(12, 2)))
    assert (finding.name, finding.level) == ("driver", Level.NO_GO)
    assert said(finding) == (
        "driver 535.183.01 takes CUDA 12.2, torch is built for CUDA 13.0.\n"
        "Kernels of a newer major release do not load.\n"
        "Use a driver from 580.65.06 on, or an image of CUDA 12."
    )


def test_an_older_minor_release_of_the_driver_is_no_fault():
    node = h100_node()
    torch = replace(node.torch, cuda=(13, 1))
    assert all(finding.level is Level.OK for finding in gpu_findings(replace(node, torch=torch), STAGE2))


def test_torch_that_can_use_no_gpu():
    node = h100_node()
    finding = bad(replace(node, torch=replace(node.torch, devices=0)))
    assert finding.what == "driver 580.95.05 lists 8 GPUs, and torch can use none of them."
    assert "nvidia-fabricmanager" in finding.remedy


def test_a_gpu_with_fewer_links_than_the_others():
    finding = bad(with_driver(active_links={**dict.fromkeys(range(8), 18), 5: 12}))
    assert (finding.name, finding.level) == ("nvlink", Level.NO_GO)
    assert said(finding) == (
        "NVLink is not whole: GPU 5 has 12 of 18 links.\n"
        "NCCL goes around the GPU or fails, and every rank waits for it.\n"
        "Leave the node out and have the GPU reset (nvidia-smi nvlink --errorcounters shows why)."
    )


def test_gpus_without_nvlink_cost_tensor_parallelism():
    pairs = {(first, second): "SYS" for first in range(8) for second in range(first + 1, 8)}
    finding = bad(with_driver(active_links=dict.fromkeys(range(8), 0), slow_pairs=pairs))
    assert (finding.name, finding.level) == ("nvlink", Level.WARNING)
    assert said(finding) == (
        "28 of 28 pairs of GPUs have no NVLink (GPU 0 to GPU 1 by SYS).\n"
        "TP 8 exchanges every layer's activations over PCIe, about a tenth as fast as NVLink.\n"
        "Use SXM nodes, or keep tensor parallelism within GPUs that are joined (nvidia-smi topo -m)."
    )
