"""Versions that this package was not tested with, kernels that a stage lacks, and what falls back at what cost."""

from dataclasses import replace

import pytest

from nemo_prolong.doctor.checks.versions import fallback_findings, kernel_findings, version_findings
from nemo_prolong.doctor.finding import Level
from tests.support.recorded_node import cpu_node, h100_node, said, stage

BF16 = ("precision.backend=auto", "train.deterministic=false")
FLASH = ("precision.attention=flash", "train.deterministic=false")
STAGE2 = stage("stage2", *BF16)


def without(*packages, **changes):
    node = h100_node(**changes)
    return replace(node, packages={**node.packages, **dict.fromkeys(packages)})


def with_package(name, version):
    node = h100_node()
    return replace(node, packages={**node.packages, name: version})


def bad(findings):
    return [finding for finding in findings if finding.level is not Level.OK]


def test_the_tested_versions_are_listed():
    (finding,) = version_findings(h100_node(), STAGE2)
    assert finding.level is Level.OK
    assert finding.what == (
        "nemo-toolkit 2.7.3, megatron-core 0.15.3, torch 2.10.0a0+b558c986e8.nv25.11, "
        "transformer_engine 2.9.0+70f53666, apex 0.1, flash_attn 2.7.4.post1+25.11, python 3.12.3, driver 580.95.05, "
        "cuda 13.0, cudnn 9.19.0, nccl 2.28.8."
    )


def test_a_package_in_another_version_than_asked_for():
    (finding,) = bad(version_findings(with_package("megatron-core", "0.16.1"), STAGE2))
    assert finding.level is Level.WARNING
    assert said(finding) == (
        "megatron-core is 0.16.1, and ==0.15.3 is asked for.\n"
        "This package is tested with the versions that it asks for; NeMo and Megatron-core break with others.\n"
        "Install the lock: make setup on a CPU, requirements/gpu-py312.lock in an image (docs/environment.md)."
    )


@pytest.mark.parametrize(("version", "words"), [(None, "is not installed"), ("unknown", "is unknown, and ==2.7.3 is")])
def test_a_package_that_is_missing_or_has_no_version(version, words):
    (finding,) = bad(version_findings(with_package("nemo-toolkit", version), None))
    assert f"nemo-toolkit {words}" in finding.what


def test_a_build_before_its_release_is_newer_than_the_releases_before():
    node = replace(with_package("torch", "2.13.0a0+5f2c.nv26.10"), requirements={"torch": "torch>=2.10"})
    assert bad(version_findings(node, None)) == []


def test_an_old_cudnn_stops_a_stage_on_gpus():
    old = replace(h100_node().torch, cudnn=(9, 13, 1))
    (finding,) = bad(version_findings(h100_node(torch=old), STAGE2))
    assert (finding.name, finding.level) == ("versions", Level.NO_GO)
    assert finding.what.startswith("cuDNN is 9.13.1, below 9.18.0. Before 9.18 the backward pass")
    assert finding.why == "The tested version is 9.19.0."
    assert finding.remedy == "Use an image with cuDNN >=9.18.0,<10 (docs/environment.md)."


def test_an_old_cudnn_is_a_warning_without_a_stage():
    old = replace(h100_node().torch, cudnn=(9, 13, 1))
    assert [finding.level for finding in bad(version_findings(h100_node(torch=old), None))] == [Level.WARNING]


def test_an_old_driver_may_have_compatibility_libraries():
    node = h100_node()
    (finding,) = bad(version_findings(replace(node, nvidia=replace(node.nvidia, driver="550.54.15")), STAGE2))
    assert (finding.level, finding.what.split(".")[0]) == (Level.WARNING, "NVIDIA driver is 550")


def test_a_cpu_needs_none_of_the_image():
    (finding,) = version_findings(cpu_node(), stage("mini/base"))
    assert finding.what == "nemo-toolkit 2.7.3, megatron-core 0.15.3, torch 2.13.0+cpu, python 3.11.7."


def test_kernels_that_run_are_named():
    (finding,) = kernel_findings(h100_node(), STAGE2)
    assert (finding.level, finding.what) == (Level.OK, "precision=bf16 runs here with the te backend.")


def test_a_stage_in_fp8_on_a_gpu_without_it_is_refused_by_the_rules():
    node = h100_node()
    gpus = tuple(replace(gpu, compute_capability=(8, 0)) for gpu in node.gpus)
    cfg = stage("stage2", "precision=fp8", "train.deterministic=false")
    (finding,) = kernel_findings(replace(node, nvidia=replace(node.nvidia, gpus=gpus)), cfg)
    assert (finding.name, finding.level) == ("kernels", Level.NO_GO)
    assert said(finding) == (
        "precision.compute=fp8 precision.backend=" + cfg.precision.backend.value + ": the kernels of this recipe for "
        "Transformer Engine are those of Hopper (sm90) and Blackwell (sm100).\n"
        "scripts/train.py ends with the same words.\n"
        "Set precision=bf16 precision.backend=torch."
    )


def test_transformer_engine_that_is_asked_for_and_missing():
    findings = kernel_findings(without("transformer_engine"), stage("stage2", "precision.backend=te", BF16[1]))
    assert [finding.what for finding in bad(findings)] == [
        "precision.compute=bf16 precision.backend=te: Transformer Engine is not installed here."
    ]


def test_flash_attn_that_is_asked_for_is_looked_for():
    cfg = stage("stage2", "precision.backend=te", *FLASH)
    assert bad(kernel_findings(h100_node(), cfg)) == []
    (finding,) = bad(kernel_findings(without("flash_attn"), cfg))
    assert finding.level is Level.NO_GO
    assert "flash" in finding.what


def test_without_a_gpu_the_missing_gpu_is_said_once():
    assert kernel_findings(cpu_node(), stage("stage2")) == []


def test_nothing_falls_back_on_a_whole_node():
    (finding,) = fallback_findings(h100_node(), STAGE2)
    assert finding.what == "nothing that is missing is replaced by something slower."


def test_torch_in_place_of_transformer_engine_is_said_with_its_cost():
    (finding,) = fallback_findings(without("transformer_engine"), stage("stage2", "precision.backend=torch"))
    assert finding.level is Level.WARNING
    assert said(finding) == (
        "Transformer Engine is not installed, so torch's kernels run.\n"
        "By arithmetic the full-size stages take about twice as long, FP8 cannot run, and activations cannot be "
        "offloaded.\n"
        "Use the image of the Dockerfile, which has Transformer Engine 2.9."
    )


def test_what_is_asked_for_by_name_does_not_fall_back():
    assert bad(fallback_findings(without("transformer_engine"), STAGE2)) == []
    assert (
        "Transformer Engine is not installed here."
        in bad(kernel_findings(without("transformer_engine"), STAGE2))[0].what
    )


def test_apex_is_missed_only_without_transformer_engine():
    assert bad(fallback_findings(without("apex"), STAGE2)) == []
    (finding,) = fallback_findings(without("apex", "transformer_engine"), None)
    assert finding.why.endswith("Without apex too, Adam and the sums of gradients are not fused.")


def test_what_flash_attn_would_give():
    (finding,) = fallback_findings(without("flash_attn"), STAGE2)
    assert finding.what == "flash-attn is not installed, so Transformer Engine's attention is cuDNN's alone."
    assert "train.deterministic=true" in finding.why


def test_gpus_without_fp8():
    node = h100_node()
    gpus = tuple(replace(gpu, compute_capability=(8, 0)) for gpu in node.gpus)
    (finding,) = fallback_findings(replace(node, nvidia=replace(node.nvidia, gpus=gpus)), STAGE2)
    assert said(finding) == (
        "the GPUs have compute capability 8.0, and FP8 needs 8.9.\n"
        "precision=fp8 is refused, so matrix products run at half the peak of a Hopper GPU or less.\n"
        "Use H100 or H200 for precision=fp8; precision=bf16 runs here."
    )


def test_on_a_cpu_nothing_falls_back():
    assert fallback_findings(cpu_node(), stage("mini/base")) == []
