"""What nvidia-smi prints on a node of eight H100 becomes facts, and what it prints when something is wrong too."""

import pytest

from nemo_prolong.doctor import nvidia
from nemo_prolong.doctor.facts import Gpu
from nemo_prolong.doctor.probing import ProbeError
from tests.support.recorded_node import RecordedPrograms, recorded


def test_the_table_of_gpus_is_read():
    drivers, gpus = nvidia.parse_gpus(recorded("gpus.csv"))
    assert drivers == ["580.95.05"] * 8
    assert [gpu.index for gpu in gpus] == list(range(8))
    assert gpus[7] == Gpu(
        index=7,
        name="NVIDIA H100 80GB HBM3",
        memory_bytes=81559 * 2**20,
        used_bytes=4 * 2**20,
        compute_capability=(9, 0),
        persistent=True,
        mig=False,
        uncorrected_errors=0,
        compute_mode="Default",
    )


def test_what_the_driver_does_not_say_is_unknown():
    line = "0, NVIDIA L4, 580.95.05, 23034, 1, 8.9, [N/A], [N/A], [N/A], Default\n"
    (gpu,) = nvidia.parse_gpus(line)[1]
    assert (gpu.persistent, gpu.mig, gpu.uncorrected_errors) == (None, False, None)


@pytest.mark.parametrize(
    "line", ["No devices were found", "0, NVIDIA H100, 580, ERR!, 1, 9.0, Enabled, Disabled, 0, Default"]
)
def test_a_line_that_is_no_gpu_is_named(line):
    with pytest.raises(ProbeError, match="nvidia-smi prints '" + line.split(",")[0]):
        nvidia.parse_gpus(f"{line}\n")


def test_the_driver_says_which_cuda_it_takes():
    assert nvidia.parse_driver_cuda(recorded("header.txt")) == (13, 0)
    assert nvidia.parse_driver_cuda("Driver Version : 580\n") is None


def test_links_are_counted_by_gpu():
    assert nvidia.parse_links(recorded("nvlink.txt")) == dict.fromkeys(range(8), 18)


def test_a_link_that_is_down_is_missed_where_it_is():
    status = recorded("nvlink.txt").replace("\t Link 3: 26.562 GB/s", "\t Link 3: <inactive>", 1)
    assert nvidia.parse_links(status) == {**dict.fromkeys(range(8), 18), 0: 17}


def test_all_pairs_of_an_nvswitch_node_are_joined():
    assert nvidia.parse_slow_pairs(recorded("topology.txt")) == {}


def test_pairs_without_nvlink_are_named_with_the_way_between_them():
    rows = ["\tGPU0\tGPU1\tGPU2", "GPU0\t X \tNV12\tSYS\t0-31", "GPU1\tNV12\t X \tPHB\t0-31", "GPU2\tSYS\tPHB\t X \t32"]
    matrix = "\n".join(rows)
    assert nvidia.parse_slow_pairs(matrix) == {(0, 2): "SYS", (1, 2): "PHB"}


def test_a_machine_without_the_program_has_no_driver():
    assert nvidia.read_driver(RecordedPrograms({nvidia.QUERY: None})) is None


def test_driver_and_gpus_are_read_together():
    driver = nvidia.read_driver(RecordedPrograms())
    assert (driver.driver, driver.cuda, len(driver.gpus)) == ("580.95.05", (13, 0), 8)
