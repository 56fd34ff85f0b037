"""Overlaps that could not take place, and those that are on by default."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_prolong.config.rules import check_platform, findings
from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Platform
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError

GRADIENTS, WEIGHTS = "parallelism.overlap_grad_reduce", "parallelism.overlap_param_gather"
BUCKET, TENSOR = "parallelism.ddp_bucket_size", "parallelism.tp_comm_overlap"
TP, CP, SP = (
    f"parallelism.{name}" for name in ("tensor_model_parallel_size", "context_parallel_size", "sequence_parallel")
)
WHOLE_OPTIMIZER = "optim.use_distributed_optimizer=false"
# On TP 2 in BF16 by Transformer Engine, rows of one length.
FITTING = ["precision=bf16", f"{TENSOR}=true", f"{TP}=2", f"{SP}=true"]

CASES: dict[str, tuple[list[str], list[str]]] = {
    "all": ([f"{GRADIENTS}=true", f"{WEIGHTS}=true", f"{BUCKET}=1000"], []),
    "none": ([f"{GRADIENTS}=false", f"{WEIGHTS}=false"], []),
    "no shards": (
        [f"{WEIGHTS}=true", WHOLE_OPTIMIZER],
        [
            f"{WEIGHTS}=true: without the distributed optimizer every rank updates all weights, and none are gathered. "
            f"Set {WEIGHTS}=null."
        ],
    ),
    "one bucket": (
        [f"{WEIGHTS}=true", f"{GRADIENTS}=false"],
        [
            f"{WEIGHTS}=true: without {GRADIENTS} all weights are one bucket, and the first layer would wait for the "
            f"last. Set {WEIGHTS}=null, or {GRADIENTS}=true."
        ],
    ),
    "a bucket for nothing": (
        [f"{BUCKET}=1000", f"{GRADIENTS}=false"],
        [f"{BUCKET}=1000: has no effect without {GRADIENTS}. Set {BUCKET}=null, or {GRADIENTS}=true."],
    ),
    "TP": (FITTING, []),
    "TP in torch": (
        [*FITTING, "precision.backend=torch"],
        [
            f"{TENSOR}=true: its buffers are Transformer Engine's, and the backend is torch. Set {TENSOR}=false, or "
            "precision.backend=te."
        ],
    ),
    "TP 1": (
        ["precision=bf16", f"{TENSOR}=true"],
        [
            f"{TENSOR}=true: overlaps the exchange between TP ranks, and TP is 1. Set {TENSOR}=false, or {TP}=2 "
            f"{SP}=true."
        ],
    ),
    "no sequence parallel": (
        [*FITTING, f"{SP}=false"],
        [
            f"{TENSOR}=true: overlaps the gathers and scatters of sequence parallel, which is off. Set {TENSOR}=false, "
            f"or {SP}=true."
        ],
    ),
    "rows of many lengths": (
        [*FITTING, f"{CP}=2"],
        [
            f"{TENSOR}=true: its buffers have the size of one row exactly, and documents that are padded for CP make "
            f"rows of different lengths. Set {TENSOR}=false, or {CP}=1."
        ],
    ),
    "blockwise": (
        [*FITTING, "precision=fp8", "precision.fp8_recipe=blockwise"],
        [
            f"{TENSOR}=true: its buffers do not take blockwise scaling. Set {TENSOR}=false, or "
            "precision.fp8_recipe=tensorwise."
        ],
    ),
    "blockwise without FP8": ([*FITTING, "precision.fp8_recipe=blockwise"], []),
}


@pytest.mark.parametrize("name", CASES)
def test_an_overlap_that_could_not_take_place_is_refused(name: str, load_run: Any) -> None:
    overrides, messages = CASES[name]
    cfg = load_run("+exp=mini/base", *overrides)
    assert [str(finding) for finding in findings(cfg)] == messages


@pytest.mark.parametrize("name", CASES)
def test_the_command_of_the_remedy_is_not_refused(name: str, load_run: Any) -> None:
    overrides, messages = CASES[name]
    for message in messages:
        remedy, _, other = message.rpartition(" Set ")[2].rstrip(".").partition(", or ")
        for settings in filter(None, (remedy, other)):
            assert findings(load_run("+exp=mini/base", *overrides, *settings.split())) == [], settings


def test_overlap_of_tp_is_refused_where_auto_turns_out_to_be_torch(load_run: Any) -> None:
    cfg: RunConfig = load_run("+exp=mini/base", *FITTING)
    check_platform(cfg, ASSUMED_PLATFORM)
    with pytest.raises(ConfigError, match="its buffers are Transformer Engine's, and the backend is torch"):
        check_platform(cfg, Platform())


@pytest.mark.parametrize(
    ("overrides", "gathers_early"),
    [
        ([], True),
        ([f"{WEIGHTS}=false"], False),
        ([f"{GRADIENTS}=false"], False),
        ([WHOLE_OPTIMIZER], False),
    ],
)
def test_weights_are_gathered_early_where_that_is_possible(
    overrides: list[str], gathers_early: bool, load_run: Any
) -> None:
    cfg: RunConfig = load_run("+exp=stage1", "parent=x", *overrides)
    assert cfg.parallelism.gathers_params_early(cfg.optim.use_distributed_optimizer) is gathers_early
    assert findings(cfg) == []


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_a_full_size_stage_overlaps_what_costs_nothing(stage: str, load_run: Any) -> None:
    parallelism = load_run(f"+exp={stage}", "parent=x").parallelism
    assert (parallelism.overlap_grad_reduce, parallelism.overlap_param_gather) == (True, None)
    assert (parallelism.tp_comm_overlap, parallelism.ddp_bucket_size) == (False, None)
