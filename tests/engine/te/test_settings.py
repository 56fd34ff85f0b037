"""Fields, data steps and process groups of the Transformer Engine backend, in an environment without it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.launches import run_module

BF16, TENSORWISE, BLOCKWISE, ATTENTION = range(4)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the program saw."""
    return json.loads(run_module("tests.engine.te.settings_program").splitlines()[-1])


def test_bf16_leaves_fp8_off(found):
    settings = found["settings"][BF16]
    assert settings["model"]["fp8"] is settings["plugin"]["fp8"] is None
    assert (settings["layers"], settings["data_step"], settings["bf16"]) == ("te_layer_spec", "te_data_step", True)


@pytest.mark.parametrize(
    ("number", "recipe", "attention", "step"),
    [
        (TENSORWISE, "tensorwise", False, "fp8_data_step"),
        (BLOCKWISE, "blockwise", False, "fp8_block_data_step"),
        (ATTENTION, "delayed", True, "fp8_data_step"),
    ],
)
def test_fp8_is_the_recipe_with_weights_in_bf16(found, number, recipe, attention, step):
    settings = found["settings"][number]
    assert settings["model"]["fp8"] == "hybrid" and settings["model"]["fp8_recipe"] == recipe
    assert settings["model"]["fp8_dot_product_attention"] is attention
    assert settings["model"]["fp8_multi_head_attention"] is False
    assert (settings["data_step"], settings["bf16"], settings["gathers_fp8_weights"]) == (step, True, False)
    # Scales of FP8 attention are reduced over the ranks that share a row: others may have none.
    assert settings["tp_only_amax_red"] is attention


def test_the_plugin_tells_the_model_how_it_was_built(found):
    for settings in found["settings"]:
        assert len(settings["model"]) == 9 and settings["plugin"] == settings["model"]


def test_rows_under_fp8_are_multiples_of_its_tile(found):
    tiles = {BF16: 8, TENSORWISE: 128, BLOCKWISE: 1024, ATTENTION: 128}
    for number, tile in tiles.items():
        (total, part, documents), equal = found["padded"][number]
        assert total == -(-(4 + 700 + 4) // tile) * tile and part == total // 2 and documents is None
        assert equal == [1024, 512, 1]


def test_rows_are_described_by_few_numbers_of_documents(found):
    for number in (BF16, TENSORWISE, BLOCKWISE, ATTENTION):
        assert found["documents"][number] == [32, 32]


def test_empty_documents_change_no_bit_of_loss_and_gradient(found):
    plain, few = found["losses"]
    assert plain["documents"] == 5 and few["documents"] == 32
    assert plain["loss"] == few["loss"] > 0 and plain["gradients"] == few["gradients"]


def test_sines_and_cosines_are_computed_once_in_a_forward_pass(found):
    # Of 2 layers, each of which has queries and keys, and is computed twice.
    assert [case["cosines"] for case in found["losses"]] == [1, 1]


def test_kernels_of_attention_are_what_megatron_calls_them(found):
    assert found["attention_backends"] == {"auto": "auto", "cudnn": "fused", "flash": "flash"}


def test_the_strategy_asks_for_hierarchical_groups(found):
    assert found["strategy"] == {"hierarchical_context_parallel_sizes": [2, 2]}


@pytest.mark.distributed
def test_four_ranks_have_the_groups_of_the_all_to_all_and_of_the_ring(tmp_path):
    output = tmp_path / "groups.json"
    run_module("tests.engine.te.groups_program", str(output))
    everyone = json.loads(output.read_text())
    assert [rank["cp"] for rank in everyone] == [[0, 1, 2, 3]] * 4
    assert [rank["ranks"] for rank in everyone] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]
    assert [rank["sums"] for rank in everyone] == [[11, 101], [11, 1010], [1100, 101], [1100, 1010]]
