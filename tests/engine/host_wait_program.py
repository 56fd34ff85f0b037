"""Train stages and write down who asks for the value of a tensor, on rank 0: ``host_wait_program.py CASES.json``.

A case is ``{"config": RunConfig, "ranks": int, "output": path}``; its ranks are forks of this process.

On a GPU every such question makes the host wait until the device has caught up, and the device idle until the host has.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine import train_stage
from nemo_prolong.engine.patches import prepare
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fork_ranks import run_ranks

# What reads a tensor on the host, or makes a tensor whose size depends on values.
QUESTIONS = (
    *("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal"),
    *("__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"),
)
SCHEDULE = "megatron/core/pipeline_parallel/schedules.py"


class HostWaits(TorchFunctionMode):
    """Counts questions by who asks: ``[place, function]``, and whether it is between the micro-batches of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = {getattr(torch.Tensor, name) for name in QUESTIONS}
        self.found: Counter[tuple[bool, str]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.questions:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][:-1]
            asker = frames[-1]
            names = {frame.name for frame in frames}
            # The step's gradients are finished inside the schedule, once, after the last micro-batch.
            in_micro_batch = any(SCHEDULE in frame.filename for frame in frames) and "finalize_model_grads" not in names
            self.found[in_micro_batch, f"{Path(asker.filename).name} {asker.name}"] += 1
        return func(*args, **(kwargs or {}))


def watch(case: dict[str, Any], rank: int) -> None:
    """Train under the mode, as one rank."""
    cfg = RunConfig(**case["config"])
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    waits = HostWaits()
    with waits:
        train_stage(cfg, RunDirectory(cfg.run_dir), None, None)
    if rank == 0:
        rows = [[in_micro_batch, place, count] for (in_micro_batch, place), count in waits.found.items()]
        Path(case["output"]).write_text(json.dumps(rows))


def main() -> None:
    """Watch every case."""
    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imported here for all forks

    for case in json.loads(Path(sys.argv[1]).read_text()):
        if any(run_ranks(functools.partial(watch, case), case["ranks"], case["output"])):
            logs = (Path(f"{case['output']}.rank{rank}.log") for rank in range(case["ranks"]))
            sys.exit("\n".join(f"{log}\n{log.read_text()[-4000:]}" for log in logs))


if __name__ == "__main__":
    main()
