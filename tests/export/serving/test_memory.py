"""What fits on which device, as sums that can be done by hand."""

from __future__ import annotations

import pytest

from nemo_prolong.config.schema import ExportTargetConfig
from nemo_prolong.errors import ExportError
from nemo_prolong.export.serving.memory import (
    FIXED_RESERVE_BYTES,
    GPU_MEMORY_BYTES,
    check_memory,
    plan_memory,
)

CONTEXT = 2**19


def target(**changes) -> ExportTargetConfig:
    return ExportTargetConfig(**{"format": "trtllm", **changes})


def test_memory_of_llama_3_8b_at_512k_is_a_sum_of_parts(llama3_8b):
    plan = plan_memory(llama3_8b, CONTEXT, target())
    assert plan.weights_bytes == 2 * 8_030_261_248
    # 32 layers, keys and values, 8 heads of 128, 2 bytes.
    assert plan.kv_bytes_per_token == 131_072 and plan.kv_needed_bytes == 2**36
    # 8,192 tokens of 4 x 4,096 + 48 heads x 128 + 3 x 14,336 values of 2 bytes, and 128,256 logits.
    assert plan.activation_bytes == 8192 * 65_536 * 2 + 128_256 * 4
    left = GPU_MEMORY_BYTES["h100_80gb"] - plan.weights_bytes - plan.activation_bytes - FIXED_RESERVE_BYTES
    assert plan.kv_available_bytes == int(0.9 * left) and not plan.fits


def test_fp8_halves_layers_and_caches_but_not_the_vocabulary(llama3_8b):
    plan = plan_memory(llama3_8b, CONTEXT, target(quantization="fp8"))
    vocabulary_and_norms = 2 * 128_256 * 4096 + 65 * 4096
    assert plan.weights_bytes == 8_030_261_248 - vocabulary_and_norms + 2 * vocabulary_and_norms
    assert plan.kv_needed_bytes == 2**35 and plan.fits


def test_vllm_takes_its_share_before_weights_are_counted(llama3_8b):
    plan = plan_memory(llama3_8b, CONTEXT, target(format="vllm"))
    used = plan.weights_bytes + plan.activation_bytes + FIXED_RESERVE_BYTES
    assert plan.kv_available_bytes == int(GPU_MEMORY_BYTES["h100_80gb"] * 0.9) - used


def test_keys_and_values_of_a_started_block_are_counted_whole(llama3_8b):
    assert plan_memory(llama3_8b, 65, target()).kv_needed_bytes == 128 * 131_072


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "Set export.tensor_parallel_size=2, or export.quantization=fp8, or export.gpu=h200_141gb."),
        (
            {"quantization": "fp8", "max_batch_size": 4},
            "Set export.tensor_parallel_size=4, or export.gpu=b200_180gb, or export.max_batch_size=1.",
        ),
        ({"gpu": "a100_80gb"}, "Set export.tensor_parallel_size=2, or export.gpu=h200_141gb."),
        ({"gpu": "l40s_48gb", "max_batch_size": 400}, "Set export.tensor_parallel_size=4 export.max_batch_size=2."),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(llama3_8b, changes, remedy):
    with pytest.raises(ExportError) as caught:
        check_memory(llama3_8b, CONTEXT, target(**changes))
    assert caught.value.remedy == remedy
    for offer in remedy.removeprefix("Set ").removesuffix(".").split(", or "):
        settings = dict(setting.removeprefix("export.").split("=") for setting in offer.split())
        typed = {key: int(value) if value.isdigit() else value for key, value in settings.items()}
        check_memory(llama3_8b, CONTEXT, target(**{**changes, **typed}))


def test_the_message_shows_the_sum(llama3_8b):
    with pytest.raises(ExportError) as caught:
        check_memory(llama3_8b, CONTEXT, target())
    assert caught.value.rule == (
        "1 x 512K tokens do not fit: weights 15.0 GiB, activations 1.0 GiB, reserve 4.0 GiB, keys and values 64.0 GiB "
        "of 53.7 GiB left, of 79.6 GiB."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gpu": "h100"},
            "export.gpu=h100: known devices are h100_80gb, h200_141gb, b200_180gb, a100_80gb, l40s_48gb.",
        ),
        ({"gpu": "a100_80gb", "quantization": "fp8"}, "export.gpu=a100_80gb: it has no FP8."),
        ({"tensor_parallel_size": 3}, "must divide the 8 key-value heads. Set export.tensor_parallel_size=2."),
        ({"tensor_parallel_size": 16}, "must divide the 8 key-value heads. Set export.tensor_parallel_size=8."),
    ],
)
def test_devices_and_layouts_that_cannot_be_are_refused(llama3_8b, changes, message):
    with pytest.raises(ExportError) as caught:
        plan_memory(llama3_8b, CONTEXT, target(**changes))
    assert message in str(caught.value)
