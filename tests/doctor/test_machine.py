"""A recorded node is read part by part; a part that is missing or broken leaves the others whole."""

import time
from dataclasses import replace

from nemo_prolong.doctor import nvidia
from nemo_prolong.doctor.facts import FabricPort, TorchFacts
from nemo_prolong.doctor.machine import read_available_memory, read_limits, read_machine, read_ports, read_volume
from tests.support.recorded_node import GIB, RecordedPrograms, h100_node, recorded_host, write_kernel_files


def read(host):
    return read_machine(host.probes(), time.monotonic() + 30)


def test_the_recorded_node_is_read(tmp_path):
    machine, problems = read(recorded_host(tmp_path))
    expected = h100_node()
    assert problems == []
    assert machine.nvidia == expected.nvidia
    assert machine.ports == expected.ports
    assert machine.torch == expected.torch
    assert machine.available_memory_bytes == 2040109465 * 1024
    assert machine.packages["megatron-core"] == "0.15.3"
    assert machine.requirements["megatron-core"] == "megatron-core==0.15.3"
    assert "pytest" not in machine.requirements


def test_without_a_driver_torch_is_not_imported(tmp_path):
    host = recorded_host(tmp_path, RecordedPrograms(dict.fromkeys((nvidia.QUERY, nvidia.LINKS, nvidia.TOPOLOGY))))
    (tmp_path / "proc/driver/nvidia/version").unlink()
    machine, problems = read(host)
    assert (machine.nvidia, machine.torch, problems) == (None, None, [])


def test_a_driver_that_fails_is_a_finding_and_the_rest_is_read(tmp_path):
    programs = RecordedPrograms()
    programs.outputs |= {nvidia.QUERY: "!nvidia-smi ended with 18: Driver/library version mismatch"}
    machine, (problem,) = read(recorded_host(tmp_path, programs))
    assert machine.nvidia is None
    assert len(machine.ports) == 8
    assert problem.what == "nvidia-smi cannot be read (nvidia-smi ended with 18: Driver/library version mismatch)."


def test_torch_that_says_nothing_sensible_is_a_finding(tmp_path):
    programs = RecordedPrograms()
    programs.outputs["torch"] = "Segmentation fault"
    machine, (problem,) = read(recorded_host(tmp_path, programs))
    assert machine.torch is None
    assert problem.what == "torch with CUDA cannot be read (torch says 'Segmentation fault' of its libraries)."


def test_torch_without_a_gpu_to_use_says_so(tmp_path):
    programs = RecordedPrograms()
    programs.outputs["torch"] = (
        'a warning\n{"version": "2.13.0+cpu", "cuda": null, "cudnn": null, "nccl": null, "devices": 0}'
    )
    assert read(recorded_host(tmp_path, programs))[0].torch == TorchFacts("2.13.0+cpu", None, None, None, 0)


def test_a_port_is_read_as_the_kernel_says_it(tmp_path):
    port = write_kernel_files(tmp_path) / "sys/class/infiniband/mlx5_0/ports/1"
    (port / "state").write_text("1: DOWN\n")
    (port / "rate").unlink()
    (port / "link_layer").write_text("Ethernet\n")
    assert read_ports(tmp_path)[0] == FabricPort("mlx5_0", 1, False, "DOWN", None, "Ethernet")


def test_the_control_group_may_allow_less_than_the_machine_has(tmp_path):
    write_kernel_files(tmp_path)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{64 * GIB}\n")
    (tmp_path / "sys/fs/cgroup/pids.max").write_text("512\n")
    assert read_available_memory(tmp_path) == 64 * GIB
    assert read_limits(tmp_path).processes == 512


def test_room_is_that_of_the_nearest_directory_there_is(tmp_path):
    volume = read_volume(str(tmp_path / "runs" / "stage2"))
    there = read_volume(str(tmp_path))
    assert replace(volume, path="", free_bytes=0) == replace(there, path="", free_bytes=0)
    assert volume.total_bytes >= volume.free_bytes > 0
    assert volume.writable


def test_the_last_mount_over_a_path_says_what_its_file_system_is(tmp_path):
    mounts = tmp_path / "root" / "proc" / "mounts"
    mounts.parent.mkdir(parents=True)
    mounts.write_text(
        f"overlay / overlay rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nserver:/y {tmp_path}/other lustre rw 0 0\n"
    )
    assert read_volume(str(tmp_path / "runs"), tmp_path / "root").kind == "nfs4"
