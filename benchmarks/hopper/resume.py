"""Save and resume on the device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.records import Row, at_most, attempt, holds, not_run
from benchmarks.hopper.runs import TRAIN_ITERS, Job, figures, largest, largest_difference, saved, stage_config, train

_FP8 = 1e-2
_CASES = {
    "torch backend, fp32": {"compute": "fp32", "backend": "torch"},
    "torch backend, bf16": {"compute": "bf16", "backend": "torch"},
    "Transformer Engine, bf16": {"compute": "bf16", "backend": "te"},
    "Transformer Engine, fp8": {"compute": "fp8", "fp8_recipe": "delayed", "backend": "te"},
}


def run(bench: Bench) -> Iterator[Row]:
    """Train each case whole, then its second half again from the checkpoint in its middle."""
    has_te = bench.full and importlib.util.find_spec("transformer_engine") is not None
    for name, precision in _CASES.items():
        if precision["backend"] == "te" and not has_te:
            yield not_run(name, "Transformer Engine is not installed." if bench.full else "it computes on a GPU.")
        else:
            yield from attempt(name, functools.partial(resumed_rows, bench, name, precision))


def resumed_rows(bench: Bench, name: str, precision: dict[str, str]) -> Iterator[Row]:
    """Train a run, then its second half again from the checkpoint in its middle, and compare.

    Args:
        bench: Where.
        name: What to call it.
        precision: Fields of ``PrecisionConfig``.
    """
    run_name = name.replace(" ", "_").replace(",", "")
    half = TRAIN_ITERS // 2
    checkpoint = {"save_interval_steps": half, "keep_last": 2}
    whole = stage_config(bench, run_name, precision=precision, checkpoint=checkpoint)
    resumed = whole.model_copy(update={"name": f"{run_name}_resumed"})
    train(bench, [Job(whole), Job(resumed, resume=saved(whole, half))])
    pairs = [(figures(resumed, key), figures(whole, key)[half:]) for key in ("loss", "grad_norm")]
    worst = largest(largest_difference(*pair) for pair in pairs)
    if precision["compute"] == "fp8":
        # The scales of weights and activations are in the checkpoint, those that only one pass saw are not.
        yield at_most(f"{name}: difference of losses and gradient norms after a resume", worst, _FP8)
    else:
        same = all(resumed == whole for resumed, whole in pairs)
        note = f"largest relative difference {worst:.2g}"
        yield holds(f"{name}: steps after a resume are those of the whole run, every bit", same, note)


STAGE = Stage(
    name="resume",
    title="Save and resume",
    shows="Losses and gradient norms of the second half of a run, trained again from the checkpoint in its middle, "
    "against the run itself.",
    run=run,
    needs=("nemo", "megatron"),
)
