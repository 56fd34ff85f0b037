"""Peaks of devices, and the MFU that follows from them."""

from __future__ import annotations

import logging

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.schema import ModelConfig
from nemo_prolong.plan.devices import dense_peak_flops_per_second
from nemo_prolong.plan.flops import training_flops, training_flops_of_sums, training_flops_per_token

LLAMA = ModelConfig.model_validate(yaml.safe_load((CONFIG_DIR / "model" / "llama3_8b_instruct.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "fp32", "bf16", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 67, 989.4, 1978.9),
        ("NVIDIA H100 PCIe", 51, 756.5, 1513),
        ("NVIDIA H100 NVL", 60, 835.5, 1670.5),
        ("NVIDIA H200", 67, 989.4, 1978.9),
        ("NVIDIA H200 NVL", 60, 835.5, 1670.5),
        ("NVIDIA GH200 480GB", 67, 989.4, 1978.9),
        ("NVIDIA H20", 44, 148, 296),
        ("NVIDIA A100-SXM4-80GB", 19.5, 312, None),
        ("NVIDIA A100 80GB PCIe", 19.5, 312, None),
        ("NVIDIA B200", None, 2250, 4500),
        ("NVIDIA GB200", None, 2500, 5000),
        ("NVIDIA L40S", 91.6, 362, 733),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA GeForce RTX 4090", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
    ],
)
def test_the_dense_peak_of_a_device_is_that_of_its_data_sheet(name, fp32, bf16, fp8):
    for compute, expected in (("fp32", fp32), ("bf16", bf16), ("fp8", fp8)):
        peak = dense_peak_flops_per_second(name, compute)
        assert peak == (None if expected is None else pytest.approx(expected * 1e12)), (name, compute)


@given(st.lists(st.integers(1, 524_288), max_size=50))
def test_the_flops_of_documents_follow_from_two_sums(lengths):
    squared = sum(length**2 for length in lengths)
    assert training_flops_of_sums(LLAMA, sum(lengths), squared) == training_flops(LLAMA, lengths)


def test_mfu_is_what_nvidia_printed_for_llama_3_8b():
    # 14,451 tokens/s and GPU were printed as 744 TFLOP/s: 75% of an H100's BF16 peak.
    flops = 14_451 * training_flops_per_token(LLAMA, 8192)
    assert flops == pytest.approx(744e12, rel=2e-3)
    assert flops / dense_peak_flops_per_second("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(0.752, abs=1e-3)


def test_a_step_becomes_rates_and_an_unknown_device_a_warning(caplog):
    from nemo_prolong.config.schema import RunConfig
    from nemo_prolong.telemetry.performance import Performance
    from nemo_prolong.telemetry.step_sums import GroupLoss, StepTotals

    cfg = RunConfig.model_construct(
        model=LLAMA,
        seq_length=8192,
        train=type("Train", (), {"global_batch_size": 16}),
        precision=type("Precision", (), {"compute": "bf16"}),
    )
    lengths = [8192] * 16
    totals = StepTotals(GroupLoss(1.0, 1), {}, {}, sum(lengths), sum(length**2 for length in lengths), 0.0, 0)
    figures = Performance(cfg, "NVIDIA H100 80GB HBM3", world_size=8).figures(totals, seconds=2.0)
    flops = training_flops(LLAMA, lengths)
    assert figures["model_flops"] == flops
    assert figures["model_flops_per_second_per_rank"] == pytest.approx(flops / 16, rel=1e-9)
    assert figures["mfu"] == pytest.approx(flops / 16 / 989.4e12, abs=1e-5)
    assert figures["tokens_per_second"] == 8 * 8192 and figures["tokens_per_second_per_rank"] == 8192
    assert caplog.records == []

    with caplog.at_level(logging.WARNING):
        unknown = Performance(cfg, "NVIDIA GeForce RTX 4090", world_size=8)
        assert all("mfu" not in unknown.figures(totals, seconds=2.0) for _ in range(3))
    assert [record.getMessage() for record in caplog.records] == [
        "MFU is not reported: the dense bf16 peak of NVIDIA GeForce RTX 4090 is not known"
    ]
    caplog.clear()
    for compute, shares in {
        "fp32": {"mfu"},
        "fp8": {"mfu", "fp8_peak_share"},
        "fp8_attention": {"mfu", "fp8_peak_share"},
    }.items():
        cfg = cfg.model_copy(update={"precision": type("Precision", (), {"compute": compute})})
        other = Performance(cfg, "NVIDIA H100 80GB HBM3", world_size=8).figures(totals, seconds=2.0)
        # One convention for all, so that runs of different precision can be compared.
        assert other["mfu"] == figures["mfu"]
        assert {key for key in other if key not in figures or key == "mfu"} == shares
    assert other["fp8_peak_share"] == pytest.approx(flops / 16 / 1978.9e12, abs=1e-5)
    a100 = Performance(cfg, "NVIDIA A100-SXM4-80GB", world_size=8).figures(totals, seconds=2.0)
    assert "mfu" in a100 and "fp8_peak_share" not in a100, "an A100 has no FP8"
    assert "mfu" not in Performance(cfg, None, world_size=8).figures(totals, seconds=2.0)
    assert caplog.records == [], "a CPU is no surprise"
