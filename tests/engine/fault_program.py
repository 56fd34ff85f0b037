"""Stages of two ranks with faults; ``fault_program.py CASES.json OUTPUT`` writes {case: exit statuses of the ranks}.

A case is ``{"name": str, "config": RunConfig, "fault": {"kind": str, "rank": int, "step": int} or null}``. A fault
happens on one rank while it trains that step: ``sigterm`` and ``sigstop`` hit its process, ``nan`` spoils its loss,
``nan_from`` the losses of all steps from there on.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fork_ranks import run_ranks

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ProlongError


def train(case: dict[str, Any], rank: int) -> None:
    """Be one rank of a case."""
    from nemo_prolong.stages.run import run_stage

    if case["fault"] and case["fault"]["rank"] == rank:
        prepare(case["fault"])
    try:
        run_stage(RunConfig(**case["config"]), [])
    except ProlongError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


def prepare(fault: dict[str, Any]) -> None:
    """Have the fault happen on this rank."""
    from nemo_prolong.engine.faults.step_guard import StepGuard
    from nemo_prolong.engine.packed_step import ExactLossReduction

    begin, forward = StepGuard.on_train_batch_start, ExactLossReduction.forward
    now = {"step": 0}

    def on_train_batch_start(self: StepGuard, trainer: Any, *args: Any) -> None:
        begin(self, trainer, *args)
        now["step"] = trainer.global_step + 1
        if now["step"] == fault["step"] and fault["kind"] in ("sigterm", "sigstop"):
            os.kill(os.getpid(), getattr(signal, fault["kind"].upper()))

    def spoiled(self: ExactLossReduction, batch: Any, forward_out: Any) -> Any:
        loss, targets, report = forward(self, batch, forward_out)
        is_spoiled = (fault["kind"] == "nan" and now["step"] == fault["step"]) or (
            fault["kind"] == "nan_from" and now["step"] >= fault["step"]
        )
        return (loss * float("nan"), targets, report) if is_spoiled else (loss, targets, report)

    StepGuard.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    ExactLossReduction.forward = spoiled  # type: ignore[method-assign]


def main() -> None:
    """Run every case."""
    import nemo_prolong.engine.stage_training  # noqa: F401 - imports NeMo, before the forks

    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    statuses = {}
    for case in cases:
        log = str(output.with_name(case["name"]))
        statuses[case["name"]] = run_ranks(functools.partial(train, case), 2, log, seconds_after_first_end=30)
    output.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
