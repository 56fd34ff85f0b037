"""Overlaps and recomputation change no number, on two ranks: not in losses, weights, saves, nor after skipped steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_prolong.weights.checkpoint_reader import CheckpointReader
from tests.engine.overlap_program import RANKS, SPOILED_STEP
from tests.support.launches import run_module
from tests.support.tiny import read_metrics

TIMEOUT_SECONDS = 1200
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(TIMEOUT_SECONDS)]

STEPS = 5
FIRST_SAVE = SPOILED_STEP
NO_OVERLAP = {"overlap_grad_reduce": False}
# Twelve buckets. Megatron's own choice would be one.
OVERLAP = {"ddp_bucket_size": 10_000}
CP2, PP2 = {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TIED = {"share_embeddings_and_output_weights": True}
# With several buckets a rank sums other parts of the norm: where that clips, the last bit may be another.
NOT_CLIPPED, CLIPPED = {"clip_grad": 1e6}, {"clip_grad": 0.5}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}

PLAIN: dict[str, dict[str, Any]] = {
    "dp2": {},
    "cp2": {"parallelism": CP2},
    "pp2": {"parallelism": PP2},
    "tied": {"model": TIED},
    "clipped": {"optim": CLIPPED},
}
"""Stages without overlaps."""

SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "gradients": ("dp2", {"parallelism": OVERLAP | {"overlap_param_gather": False}}),
    "weights": ("dp2", {"parallelism": OVERLAP}),
    "full_recompute": ("dp2", {"parallelism": OVERLAP, "precision": {"recompute": FULL}}),
    "mlp_recompute": ("dp2", {"parallelism": OVERLAP, "precision": {"recompute": MLP}}),
    "cp2_weights": ("cp2", {"parallelism": OVERLAP | CP2}),
    "pp2_weights": ("pp2", {"parallelism": OVERLAP | PP2}),
    "tied_weights": ("tied", {"parallelism": OVERLAP, "model": TIED}),
    "clipped_weights": ("clipped", {"optim": CLIPPED}),
}
"""By name: a stage without overlaps, and changes that leave every bit of it as it is."""


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}
STAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "off": {"parallelism": NO_OVERLAP},
    "gradients": {"parallelism": {"overlap_param_gather": False}},
    "whole_optimizer": {"optim": {"use_distributed_optimizer": False}},
    "buckets": {"parallelism": {"ddp_bucket_size": 1_000_000}},
    "userbuffers": {"precision": {"compute": "bf16"}, "parallelism": TP2},
    "userbuffers_fp8": {"precision": {"compute": "fp8"}, "parallelism": TP2},
    "auto": {"precision": {"compute": "bf16", "recompute": {"recompute_granularity": "auto"}}},
}
"""Stages of which the program says what the engine is told."""


@pytest.fixture(scope="module")
def runs(workspace: Path, make_config: Callable[..., Any]) -> Path:
    """The directory of all runs, with one that resumes a checkpoint of ``dp2`` with overlaps."""

    def job(name: str, changes: dict[str, Any], resume: Path | None = None) -> dict[str, Any]:
        config = make_config(
            name=f"overlap/{name}",
            data={"validation": ["rows"]},
            checkpoint={"save_interval_steps": FIRST_SAVE, "keep_last": 9},
            train={"train_iters": STEPS, "val_check_interval": 1, "limit_val_batches": 1},
            **{"optim": NOT_CLIPPED} | changes,
        )
        return {"config": config.model_dump(mode="json"), "resume": resume and str(resume)}

    jobs = [
        job(name, changes | {"parallelism": NO_OVERLAP | changes.get("parallelism", {})})
        for name, changes in PLAIN.items()
    ]
    jobs += [job(name, changes) for name, (_, changes) in SAME.items()]
    jobs.append(job("resumed", {"parallelism": OVERLAP}, saved(workspace / "overlap" / "dp2", FIRST_SAVE)))
    stages = {name: make_config(**changes).model_dump(mode="json") for name, changes in STAGES.items()}
    path, directory = workspace / "overlaps.json", workspace / "overlap"
    path.write_text(json.dumps({"jobs": jobs, "stages": stages}))
    directory.mkdir()
    run_module(
        "tests.engine.overlap_program", str(path), str(directory / "settings.json"), timeout_seconds=TIMEOUT_SECONDS
    )
    return directory


@pytest.fixture(scope="module")
def settings(runs: Path) -> dict[str, Any]:
    """What the engine is told for ``STAGES``."""
    return json.loads((runs / "settings.json").read_text())


def saved(run_dir: Path, step: int) -> Path:
    """Return the checkpoint of a step."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def texts(run_dir: Path, key: str, after_step: int = 0) -> list[str]:
    """Return the values of a key over the steps with every digit; NaN as text, because it does not equal itself."""
    return [str(record[key]) for record in read_metrics(run_dir) if key in record and record["step"] > after_step]


def weight_hashes(run_dir: Path, moment: str) -> list[dict[str, str]]:
    """Return for every rank the hash of its weights by step, at the end of the step or after its validation."""
    files = [run_dir / f"weights.rank{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text())[moment] for file in files]


@pytest.mark.parametrize("name", SAME)
def test_overlap_and_recomputation_change_no_bit_of_a_loss(runs: Path, name: str) -> None:
    plain, changes = SAME[name]
    for key in ("loss", "val_loss"):
        assert texts(runs / name, key) == texts(runs / plain, key) and len(texts(runs / name, key)) == STEPS
    if "ddp_bucket_size" not in changes.get("parallelism", {}):
        assert texts(runs / name, "grad_norm") == texts(runs / plain, "grad_norm")


@pytest.mark.parametrize("name", SAME)
def test_every_save_has_the_weights_of_the_step_before_it(runs: Path, name: str) -> None:
    for step in (FIRST_SAVE, STEPS):
        ours, plain = (CheckpointReader(saved(runs / run, step)) for run in (name, SAME[name][0]))
        assert set(ours.names()) == set(plain.names())
        differing = [key for key in plain.names() if not torch.equal(ours.read(key), plain.read(key))]
        assert differing == [], step


def test_weights_are_gathered_late_and_for_every_validation(runs: Path) -> None:
    first, second = weight_hashes(runs / "weights", "step")
    stale = [int(step) for step in first if first[step] != second[step]]
    # Warmup begins at a learning rate of zero, and the spoiled step is skipped: neither changes a weight.
    assert stale == [2, 4, 5]
    validated = weight_hashes(runs / "weights", "validation")
    assert validated[0] == validated[1] == weight_hashes(runs / "dp2", "validation")[0]


def test_a_skipped_step_leaves_the_weights_of_the_step_before(runs: Path) -> None:
    skipped, before = str(SPOILED_STEP), str(SPOILED_STEP - 1)
    for name in ("dp2", *SAME):
        at_end, validated = weight_hashes(runs / name, "step"), weight_hashes(runs / name, "validation")
        assert all(rank[skipped] == rank[before] for rank in validated), name
        assert [rank[skipped] for rank in at_end] == [rank[before] for rank in validated], name
        assert texts(runs / name, "skipped_steps")[-1] == "1"


def test_a_run_goes_on_with_overlaps_from_a_save_without(runs: Path) -> None:
    for key in ("loss", "val_loss"):
        resumed = texts(runs / "resumed", key, after_step=FIRST_SAVE)
        assert resumed == texts(runs / "dp2", key, after_step=FIRST_SAVE) and len(resumed) == STEPS - FIRST_SAVE


def test_megatron_is_told_which_overlaps_are_on(settings: dict[str, Any]) -> None:
    expected = {
        "default": (True, True, None),
        "off": (False, False, None),
        "gradients": (True, False, None),
        "whole_optimizer": (True, False, None),
        "buckets": (True, True, 1_000_000),
    }
    names = ("overlap_grad_reduce", "overlap_param_gather", "bucket_size")
    told = settings["exchange"]
    assert {stage: tuple(told[stage][name] for name in names) for stage in expected} == expected
    assert not any(stage["align_param_gather"] for stage in told.values())


def test_gradients_are_fused_with_transformer_engine_or_a_kernel(settings: dict[str, Any]) -> None:
    refusal = (
        "precision.gradient_accumulation_fusion=true: the torch backend needs apex's kernel "
        "fused_weight_gradient_mlp_cuda for it, which is not installed here. Set "
        "precision.gradient_accumulation_fusion=null, or precision.backend=te, which has a kernel of its own."
    )
    assert settings["fusion"] == {
        "te None": True,
        "te True": True,
        "te False": False,
        "torch None": False,
        "torch True": refusal,
        "torch False": False,
    }


def test_buffers_between_tp_ranks_have_the_size_of_a_row(settings: dict[str, Any]) -> None:
    assert settings["tp_comm_overlap"] == [False, True]
    common = {"shape": [64, 64], "tp_size": 2, "bootstrap_backend": "nccl", "freed": True}
    assert settings["userbuffers"] == [
        common | {"quantization_modes": ["none"]},
        common | {"quantization_modes": ["fp8"]},
    ]


def test_auto_is_what_the_plan_chooses_and_the_stage_says_so(settings: dict[str, Any]) -> None:
    (large, small, torch_backend, by_hand) = settings["recompute"]
    nothing = dict.fromkeys(FULL | {"recompute_modules": None}) | {"distribute_saved_activations": False}
    assert large[0] == by_hand[0] == nothing and by_hand[1] == []
    assert small[0] == torch_backend[0] == nothing | FULL
    assert large[1][0].startswith("INFO computes nothing again in the backward pass: of 80.0 GB a rank, of which 10% ")
    # CUDA and NCCL take 4 GB of them, and less than 10% would be left free.
    assert small[1][0].startswith("WARNING computes every layer again in the backward pass: of 4.4 GB a rank, ")
    assert torch_backend[1] == [
        "INFO computes every layer again in the backward pass: what the torch backend keeps is not planned"
    ]
