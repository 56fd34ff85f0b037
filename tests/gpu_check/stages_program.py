"""Run the stages that need NeMo on CPU tensors, one after the other in this process, and write their rows as JSON.

``python stages_program.py FILE``: stage -> rows. The Transformer Engine stage itself needs a GPU; its parts run here
with the torch backend on both sides.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.hopper import resume, transformer_engine
from benchmarks.hopper.bench import Bench
from benchmarks.hopper.measure import release
from benchmarks.hopper.quick.cases import CASES
from benchmarks.hopper.quick.worker import case_rows
from benchmarks.hopper.records import Row, attempt, measured
from benchmarks.hopper.stages import STAGES
from nemo_prolong.config.schema import PrecisionConfig

DEVICE = torch.device("cpu")


def torch_for_both(bench: Bench) -> Iterable[Row]:
    """Run every part of the Transformer Engine stage that the torch backend can stand in for."""
    bf16 = PrecisionConfig(compute="bf16", backend="torch")
    yield from transformer_engine.attention_rows(bench, bf16, contextlib.nullcontext, "attention")
    yield from transformer_engine.checkpoint_rows(bench, bf16, bf16, "torch and torch")
    cases = {
        "torch fp32": ({"compute": "fp32"}, 0.0),
        "torch bf16": ({"compute": "bf16"}, 0.01),
        "no kernels": ({"compute": "bf16", "backend": "te"}, 0.01),
    }
    yield from transformer_engine.run_rows(bench, cases, "torch fp32")


def quick_cases(bench: Bench) -> Iterable[Row]:
    """Run every case of the quick check as its process does."""
    for case in CASES.values():
        yield from attempt(case.title, lambda case=case: case_rows(case, bench))


def leave_groups() -> None:
    """Leave what a part formed: the engine's own runs form theirs."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def models_held() -> Row:
    """Count the models that live on when a part is over: on a GPU the next one would lack their memory."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    release(DEVICE)
    return measured("models held", sum(issubclass(type(thing), GPTModel) for thing in gc.get_objects()), "")


def main() -> None:
    """Run them. Memory is counted in a process that has done nothing else, as the check itself does."""
    parts: dict[str, Callable[[Bench], Iterable[Row]]] = {name: stage.run for name, stage in STAGES.items()}
    # One case is enough here; every save takes a second.
    bf16 = {"compute": "bf16", "backend": "torch"}
    parts["resume"] = lambda bench: resume.resumed_rows(bench, "torch backend, bf16", bf16)
    parts["torch for both"] = torch_for_both
    parts["quick"] = quick_cases
    results = {}
    for name in (
        "layers",
        "engine",
        "resume",
        "quick",
        "torch for both",
        "transformer_engine",
        "data_loader",
        "fp8_export",
    ):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            part = parts[name]
            rows = list(attempt(name, lambda part=part, scratch=scratch: part(Bench(DEVICE, Path(scratch)))))
        results[name] = [row.as_json() for row in rows]
        leave_groups()
        if name == "layers":
            results["after layers"] = [models_held().as_json()]
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
