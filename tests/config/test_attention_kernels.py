"""The rules of single kernels of attention: which releases, heads and lengths they take, and what they need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.config.rules.constraint_table import te_attentions
from nemo_prolong.config.rules.constraints import broken_rules
from nemo_prolong.config.schema import KernelBackend

H100 = Platform((2, 9), (9, 0), cudnn=(9, 19), cuda=(13, 0), flash_attn=(2, 8, 1))
B200 = replace(H100, compute_capability=(10, 0))
BF16_ROW = te_attentions(H100)[1]
FP8_BATCH = replace(BF16_ROW, compute="fp8_attention", fp8_recipe="delayed", dtype="fp8", layout="bshd")
UNGROUPED = replace(BF16_ROW, num_query_groups=4)


@pytest.mark.parametrize(
    ("release", "architecture", "takes"),
    [
        ((2, 1, 0), 9, False),
        ((2, 1, 1), 9, True),
        ((2, 8, 1), 9, True),
        ((2, 8, 2), 9, False),
        ((2, 7, 2), 10, False),
        ((2, 7, 3), 10, True),
        (None, 9, False),
    ],
)
def test_flash_attn_is_one_that_transformer_engine_takes(release, architecture, takes):
    platform = replace(H100, compute_capability=(architecture, 0), flash_attn=release)
    flash = replace(BF16_ROW, kernels="flash", platform=platform)
    assert ("no_flash_attn" in {rule.name for rule in broken_rules(flash)}) == (not takes)
    if not takes:
        named = "no flash-attn" if release is None else f"flash-attn {'.'.join(map(str, release))}"
        assert f"precision.attention=flash ({named}): " in str(broken_rules(flash)[0].finding(flash))
    third = {rule.name for rule in broken_rules(replace(flash, platform=replace(platform, flash_attn_3=(3, 0))))}
    assert ("no_flash_attn" in third) == (not takes and architecture == 10)


@pytest.mark.parametrize(
    ("heads", "rank_tokens", "gib", "refused"),
    [(4, 65_536, 1024, True), (8, 32_768, 512, True), (4, 4096, 4, False), (4, 4097, 16, True), (1, 8192, 4, False)],
)
def test_a_workspace_that_is_too_large_is_refused(heads, rank_tokens, gib, refused):
    row = replace(BF16_ROW, deterministic=True, num_attention_heads=heads, rank_tokens=rank_tokens)
    assert row.deterministic_workspace_bytes == gib * 2**30
    assert ("hopper_deterministic" in {rule.name for rule in broken_rules(row)}) == refused


@pytest.mark.parametrize(
    "change", [{"deterministic": False}, {"kernels": "flash"}, {"backend": KernelBackend.TORCH}, {"platform": B200}]
)
def test_only_deterministic_cudnn_on_hopper_needs_that_workspace(change):
    row = replace(BF16_ROW, deterministic=True)
    assert "hopper_deterministic" in {rule.name for rule in broken_rules(row)}
    assert "hopper_deterministic" not in {rule.name for rule in broken_rules(replace(row, **change))}


def test_a_newer_flash_attn_3_repeats_whatever_flash_attn_2_is_there():
    platform = replace(H100, flash_attn=(2, 4, 0), flash_attn_3=(3, 0, 0))
    row = replace(BF16_ROW, kernels="flash", deterministic=True, platform=platform)
    assert broken_rules(row) == []


@pytest.mark.parametrize(("cudnn", "refused"), [((9, 10, 0), True), ((9, 10, 1, 4), True), ((9, 10, 2), False)])
def test_two_releases_of_cudnn_have_bugs(cudnn, refused):
    attention = replace(BF16_ROW, platform=replace(H100, cudnn=cudnn))
    assert ("cudnn_bugs" in {rule.name for rule in broken_rules(attention)}) == refused


@pytest.mark.parametrize(
    ("architecture", "kv_channels", "refused"),
    [
        (9, 128, False),
        (9, 112, True),
        (9, 144, True),
        (10, 128, False),
        (10, 16, False),
        (10, 144, True),
        (10, 120, True),
        (10, 17, True),
    ],
)
def test_fp8_attention_takes_the_heads_that_its_kernel_trains(architecture, kv_channels, refused):
    platform = Platform((2, 19), (architecture, 0), cudnn=(9, 19), cuda=(13, 0))
    rules = broken_rules(replace(FP8_BATCH, kv_channels=kv_channels, platform=platform))
    assert [rule.name for rule in rules] == ([f"fp8_head_{'hopper' if architecture == 9 else 'blackwell'}"] * refused)


def test_offsets_are_of_all_elements_of_a_row():
    # 4 heads of 128 channels, 2**22 tokens: one element more than 32 bits count.
    old = replace(H100, cudnn=(9, 4))
    largest = replace(UNGROUPED, max_seqlen=2**22 - 1, platform=old)
    for attention, refused in ((largest, False), (replace(largest, max_seqlen=2**22), True)):
        assert ("cudnn_offsets" in {rule.name for rule in broken_rules(attention)}) == refused
