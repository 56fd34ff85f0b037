"""The plan of memory: the table it was drawn up for, and the recomputation that follows from it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import RecomputeConfig, RunConfig
from nemo_prolong.plan.memory import (
    ASSUMED_DEVICE_BYTES,
    EVERY_LAYER,
    FIXED_BYTES,
    MLP,
    NOTHING,
    StepMemory,
    choose_recompute,
    planned_memory,
)

GB = 1e9

# stage, ranks, TP, CP: state, layer inputs, one layer, backward pass, and in all with full, MLP and no recomputation.
TABLE: dict[tuple[str, int, int, int], tuple[float, float, float, float, int, int | None, int | None]] = {
    ("stage1", 8, 4, 2): (24.1, 2.1, 1.2, 1.5, 33, 45, 67),
    ("stage1", 64, 4, 2): (13.6, 2.1, 1.2, 1.5, 22, 35, 57),
    ("stage1", 64, 2, 4): (25.6, 2.1, 1.2, 1.3, 34, 46, 68),
    ("stage2", 64, 8, 8): (7.5, 2.1, 1.2, 2.3, 17, 31, 53),
    ("stage2", 64, 4, 16): (13.6, 2.1, 1.2, 2.2, 23, 36, 57),
    ("stage2", 64, 4, 2): (13.6, 17.2, 9.4, 12.1, 56, None, None),
    ("stage2", 8, 4, 2): (24.1, 17.2, 9.4, 12.1, 67, None, None),
    ("stage2", 8, 8, 1): (18.1, 17.2, 9.7, 15.6, 65, None, None),
    ("stage2", 8, 2, 4): (36.1, 17.2, 9.3, 10.7, 77, None, None),
}
"""GB of a rank, worked out by hand for the layouts of the recipe. None does not fit on 80 GB."""

PARTS_ROUNDING, TOTAL_ROUNDING = 0.06, 0.6
"""The totals of the table are sums of rounded parts, rounded."""

NORM_OUTPUTS_GB = 2.147
"""The table keeps the output of the second norm of every layer where the MLP is computed again. Norm and first matrix
are one module of Transformer Engine, so it is computed again with them. This is 32 layers * 8,192 bytes / TP * tokens,
and all layouts of the table have as many tokens for each rank of TP."""


@functools.cache
def experiment(name: str) -> dict[str, Any]:
    """Return an experiment in plain JSON types."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load(compose("train", [f"+exp={name}", "parent=x"]), RunConfig).model_dump(mode="json")


def stage(name: str, tp: int = 4, cp: int = 2, **changes: dict[str, Any]) -> RunConfig:
    """Return an experiment at some layout, with other values in its sections."""
    values = dict(experiment(name))
    degrees = {"tensor_model_parallel_size": tp, "context_parallel_size": cp}
    for key, change in {**changes, "parallelism": degrees | changes.get("parallelism", {})}.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


def planned(row: tuple[str, int, int, int], recompute: RecomputeConfig, **changes: dict[str, Any]) -> StepMemory:
    """Return the plan of a row of the table."""
    name, world_size, tp, cp = row
    return planned_memory(stage(name, tp, cp, **changes), recompute, world_size)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_plan_gives_every_row_of_the_table(row: tuple[str, int, int, int]) -> None:
    state, inputs, layer, backward, full, mlp, nothing = TABLE[row]
    plan = planned(row, EVERY_LAYER)
    parts = [part / GB for part in (plan.state, plan.kept, plan.recomputed, plan.backward)]
    assert parts == pytest.approx([state, inputs, layer, backward], abs=PARTS_ROUNDING)
    assert plan.total / GB == pytest.approx(full, abs=TOTAL_ROUNDING)
    without = planned(row, NOTHING).total / GB
    assert without == pytest.approx(nothing, abs=TOTAL_ROUNDING) if nothing else without > 80
    again = planned(row, MLP).total / GB
    assert again + NORM_OUTPUTS_GB == pytest.approx(mlp, abs=TOTAL_ROUNDING) if mlp else again > 80


def test_a_layer_keeps_139392_bytes_by_tp_and_its_cosines() -> None:
    tokens = 65536 // 2
    per_token = planned(("stage1", 8, 4, 2), NOTHING).kept / 32 / tokens
    assert per_token == 139_392 / 4 + 1_024
    whole = planned(("stage1", 8, 4, 2), NOTHING, parallelism={"sequence_parallel": False}).kept / 32 / tokens
    # Inputs and outputs of two norms, 8,192 bytes each, are then on every rank of TP.
    assert whole == (139_392 - 4 * 8_192) / 4 + 4 * 8_192 + 1_024


def test_the_state_is_weights_gradients_and_a_share_of_adam() -> None:
    row = ("stage1", 8, 4, 2)
    parameters = (8_030_261_248 - 65 * 4096) / 4 + 65 * 4096
    whole = {"use_distributed_optimizer": False}
    assert planned(row, NOTHING).state == pytest.approx((6 + 12 / 2) * parameters)
    assert planned(row, NOTHING, optim=whole).state == pytest.approx(18 * parameters)
    assert planned(row, NOTHING, precision={"compute": "fp32"}, optim=whole).state == pytest.approx(16 * parameters)
    layers = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) / 4
    assert planned(row, NOTHING, precision={"compute": "fp8"}).state == pytest.approx(12 * parameters + 2 * layers)
    assert planned(row, NOTHING).fixed == FIXED_BYTES == 4e9


def test_a_pipeline_holds_as_many_rows_as_it_has_stages() -> None:
    row, pp2 = ("stage1", 16, 4, 2), {"pipeline_model_parallel_size": 2}
    one, two = planned(row, NOTHING), planned(row, NOTHING, parallelism=pp2)
    assert two.kept == one.kept and two.recomputed == 0
    matrices, table = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), 128256 * 4096
    assert two.state == pytest.approx((6 + 12 / 2) * (matrices / 8 + table / 4 + 65 * 4096 / 2))
    # One row a step leaves nothing to fill the pipeline with.
    assert planned(row, NOTHING, parallelism=pp2, train={"global_batch_size": 1}).kept == one.kept / 2


def test_what_full_recomputation_keeps_depends_on_its_blocks() -> None:
    row = ("stage1", 8, 4, 2)

    def full(method: str, layers: int) -> StepMemory:
        block = {"recompute_method": method, "recompute_num_layers": layers}
        return planned(row, RecomputeConfig(recompute_granularity="full", **block))

    inputs, layer = planned(row, EVERY_LAYER).kept / 32, planned(row, NOTHING).kept / 32
    assert (full("uniform", 4).kept, full("uniform", 4).recomputed) == (8 * inputs, 4 * layer)
    assert (full("block", 12).kept, full("block", 12).recomputed) == (12 * inputs + 20 * layer, layer)


CHOICES: dict[str, tuple[tuple[Any, ...], int, RecomputeConfig, bool]] = {
    "stage 1 on 8": (("stage1", 4, 2), 8, NOTHING, True),
    "SFT on 8": (("sft", 4, 2), 8, NOTHING, True),
    "stage 1 on 64": (("stage1", 4, 2), 64, NOTHING, True),
    "stage 2 on 64, TP 8": (("stage2", 8, 8), 64, NOTHING, True),
    "stage 2 on 64, TP 4": (("stage2", 4, 16), 64, NOTHING, True),
    "stage 1 on 8, TP 4 CP 1": (("stage1", 4, 1), 8, MLP, True),
    "stage 2 on 8": (("stage2", 4, 2), 8, EVERY_LAYER, True),
    "stage 2 on 8, TP 2": (("stage2", 2, 4), 8, EVERY_LAYER, False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_least_recomputation_that_leaves_a_tenth_free_is_taken(name: str) -> None:
    arguments, world_size, recompute, fits = CHOICES[name]
    choice = choose_recompute(stage(*arguments), world_size, ASSUMED_DEVICE_BYTES)
    assert (choice.recompute, choice.fits) == (recompute, fits)


def test_the_margin_is_a_tenth_of_the_device() -> None:
    cfg = stage("stage1")
    needed = planned_memory(cfg, NOTHING, 8).total / 0.9
    assert choose_recompute(cfg, 8, int(needed) + 1).recompute == NOTHING
    assert choose_recompute(cfg, 8, int(needed) - 1).recompute == MLP


def test_the_choice_is_said_with_its_numbers() -> None:
    assert choose_recompute(stage("stage1"), 8, 80_000_000_000).sentence == (
        "computes nothing again in the backward pass: of 80.0 GB a rank, of which 10% stay free, the plan needs "
        "nothing 67.2, mlp 43.3, every layer 32.9 (arithmetic, not measured)"
    )


PRESETS = {
    "h100_8_tp4_cp2": ("stage1", NOTHING, 8),
    "h100_64_tp4_cp2": ("stage1", NOTHING, 64),
    "h100_64_tp8_cp8": ("stage2", NOTHING, 64),
    "h100_64_tp4_cp16": ("stage2", NOTHING, 64),
}


def test_every_layout_file_says_what_the_plan_needs() -> None:
    files = {file.stem: file.read_text() for file in Path(CONFIG_DIR, "parallelism").glob("h100_*.yaml")}
    assert files.keys() == PRESETS.keys()
    for name, (experiment_name, recompute, world_size) in PRESETS.items():
        degrees = yaml.safe_load(files[name])
        cfg = stage(experiment_name, degrees["tensor_model_parallel_size"], degrees["context_parallel_size"])
        planned_gb = planned_memory(cfg, recompute, world_size).total / GB
        sentence = f"# Planned memory of a rank: {planned_gb:.0f} of 80 GB in BF16, nothing computed again in the "
        assert sentence in files[name], name


def test_the_documentation_shows_the_plan() -> None:
    text = (CONFIG_DIR.parent / "docs" / "precision.md").read_text()
    for (name, world_size, tp, cp), _ in TABLE.items():
        cfg = stage(name, tp, cp)
        plans = [planned_memory(cfg, recompute, world_size) for recompute in (NOTHING, MLP, EVERY_LAYER)]
        figures = " | ".join([f"{plans[0].state / GB:.1f}", *(f"{plan.total / GB:.0f}" for plan in plans)])
        assert f" | {figures} | " in text, (name, world_size, tp, cp, figures)
