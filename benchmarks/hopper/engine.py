"""The engine with the torch backend on a GPU: the losses of the same run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.hopper.bench import Bench, Stage
from benchmarks.hopper.records import Row, at_most, attempt
from benchmarks.hopper.runs import Job, figures, largest_difference, saved, stage_config, train

# A first step differs by the order of sums alone; steps then amplify it. docs/exactness.md holds layouts to the same.
_FIRST_STEP, _ALL_STEPS, _BF16 = 1e-6, 1e-4, 1e-2

# The first step has learning rate 0: only the second moves the weights away from those of a run from scratch.
_START_ITERS = 2


def run(bench: Bench) -> Iterator[Row]:
    """Train on a CPU, then the same on the device from the same weights."""
    start = stage_config(bench, "start", train={"train_iters": _START_ITERS})
    weights = {"parent": start.run_dir, "transition": "weights"}
    carried = {"parent": start.run_dir, "transition": "weights_and_optimizer"}
    reference, reference_carried = (stage_config(bench, f"cpu_{x['transition']}", **x) for x in (weights, carried))
    jobs = [Job(start), *(Job(config, parent=saved(start, _START_ITERS)) for config in (reference, reference_carried))]
    train(bench, jobs, on_cpu=True)
    expected = figures(reference)
    for name, changes in (("fp32", {}), ("bf16", {"precision": {"compute": "bf16", "backend": "torch"}})):
        config = stage_config(bench, f"device_{name}", **weights, **changes)
        yield from attempt(name, lambda config=config, name=name: _compared(bench, config, start, expected, name))
    yield from attempt(
        "optimizer state of a CPU",
        lambda: _continued(bench, stage_config(bench, "device_carried", **carried), start, figures(reference_carried)),
    )


def _compared(bench: Bench, config: Any, start: Any, expected: list[float], name: str) -> Iterator[Row]:
    train(bench, [Job(config, parent=saved(start, _START_ITERS))])
    losses = figures(config)
    steps = f"{len(losses)} steps, loss {expected[0]:.4f} to {expected[-1]:.4f}"
    if name == "bf16":
        yield at_most("bf16: difference of losses from fp32 on a CPU", largest_difference(losses, expected), _BF16)
        return
    first = largest_difference(losses[:1], expected[:1])
    yield at_most("fp32: difference of the first loss from a CPU", first, _FIRST_STEP)
    yield at_most(
        "fp32: difference of all losses from a CPU", largest_difference(losses, expected), _ALL_STEPS, note=steps
    )
    norms = figures(config, "grad_norm"), figures(stage_config(bench, "cpu_weights"), "grad_norm")
    yield at_most("fp32: difference of gradient norms from a CPU", largest_difference(*norms), _ALL_STEPS)


def _continued(bench: Bench, config: Any, start: Any, expected: list[float]) -> Iterator[Row]:
    """Start from weights and optimizer state that a CPU wrote."""
    train(bench, [Job(config, parent=saved(start, _START_ITERS))])
    difference = largest_difference(figures(config), expected)
    yield at_most("from weights and optimizer state of a CPU: difference of losses", difference, _ALL_STEPS)


STAGE = Stage(
    name="engine",
    title="Engine, torch backend",
    shows="NeMo and Megatron with the torch backend train from one checkpoint on the device and on the CPU of the "
    "machine: losses and gradient norms of every step in fp32, losses in bf16, and from optimizer state of a CPU.",
    run=run,
    needs=("nemo", "megatron"),
)
