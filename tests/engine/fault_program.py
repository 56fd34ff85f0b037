"""Stages of two ranks with faults; ``fault_program.py CASES.json OUTPUT`` writes {case: exit statuses of the ranks}.

A case is ``{"name": str, "config": RunConfig, "fault": {"kind": str, "rank": int, "step": int, ...} or null}``. A fault
happens on one rank, in that step; ``FAULTS`` says what each kind is.
"""

import errno
import functools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed import ending
from nemo_prolong.errors import DataError, ProlongError
from tests.engine import kill_program
from tests.support.fork_ranks import run_ranks

Fault = dict[str, Any]


def train(case: dict[str, Any], rank: int) -> None:
    """Be one rank of a case."""
    from nemo_prolong.stages.run import run_stage

    if case["fault"] and rank in (case["fault"]["rank"], case["fault"].get("other_rank")):
        FAULTS[case["fault"]["kind"]](case["fault"], rank)
    try:
        run_stage(RunConfig(**case["config"]), [])
    except ProlongError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    # Everything is saved, and taking NeMo apart takes longer than these stages.
    sys.stdout.flush()
    os._exit(0)


def at_steps(action: Callable[[int], None]) -> None:
    """Call ``action`` with the number of each step before it is trained."""
    from nemo_prolong.callbacks.step_guard import StepGuard

    begin = StepGuard.on_step_start

    def on_step_start(self: StepGuard, loop: Any) -> None:
        begin(self, loop)
        action(loop.step + 1)

    StepGuard.on_step_start = on_step_start  # type: ignore[method-assign]


def send(number: signal.Signals, fault: Fault, rank: int) -> None:
    """Hit the process with a signal."""
    at_steps(lambda step: os.kill(os.getpid(), number) if step == fault["step"] else None)


def spoil(fault: Fault, rank: int) -> None:
    """Spoil the loss of the step, or with ``on`` those of all steps from there on."""
    from nemo_prolong.engine.training.packed_step import ExactLossReduction

    forward, now = ExactLossReduction.forward, {"step": 0}

    def spoiled(self: ExactLossReduction, batch: Any, forward_out: Any) -> Any:
        loss, targets, report = forward(self, batch, forward_out)
        is_spoiled = now["step"] == fault["step"] or (fault.get("on") and now["step"] > fault["step"])
        return (loss * float("nan"), targets, report) if is_spoiled else (loss, targets, report)

    at_steps(lambda step: now.update(step=step))
    ExactLossReduction.forward = spoiled  # type: ignore[method-assign]


def spoil_and_stop(fault: Fault, rank: int) -> None:
    """Spoil the loss of the step, and ask the process to stop after it."""
    spoil(fault, rank)
    send(signal.SIGTERM, fault, rank)


def kill_in_save(fault: Fault, rank: int) -> None:
    """Die in the save of the step, at a point of ``kill_program.py``."""
    assert fault["step"] == kill_program.KILLED_STEP
    kill_program.arm(fault["point"])


def fail_saves(fault: Fault, rank: int) -> None:
    """Have the shards of the next saves meet a full disk, ``times`` times; the process is also asked to stop."""
    from nemo_prolong.engine.checkpoint.megatron_io import PlannedSave

    results, failures = PlannedSave.shard_results, iter(range(fault["times"]))
    send(signal.SIGTERM, fault, rank)

    def failing(self: PlannedSave) -> Any:
        found = results(self)
        if f"step_{fault['step']:08d}" in str(self.checkpoint) and next(failures, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return found

    PlannedSave.shard_results = failing  # type: ignore[method-assign]


def damage(fault: Fault, rank: int) -> None:
    """Flip a bit in the checkpoint of the step, before the run looks at it."""
    shard = next(Path(fault["run"]).glob(f"checkpoints/step_{fault['step']:08d}/weights/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def refuse_growth(fault: Fault, rank: int) -> None:
    """Let the kernel refuse every byte beyond the first 1024 of a file, until the step ``until``."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step: int) -> None:
        if step in (fault["step"], fault["until"]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024 if step == fault["step"] else hard, hard))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    at_steps(limit)


def set_clock(fault: Fault, rank: int) -> None:
    """Let every step take ``minutes[rank]`` by the clock of the checkpoint writer."""
    from nemo_prolong.callbacks import checkpoint_writer as writer

    now = {"seconds": 1e6 * rank}
    at_steps(lambda step: now.update(seconds=now["seconds"] + 60 * fault["minutes"][rank]))
    writer.time = SimpleNamespace(monotonic=lambda: now["seconds"])


def kill_loader(fault: Fault, rank: int) -> None:
    """Kill the process that loads the rows of this rank."""

    def kill(step: int) -> None:
        if step == fault["step"]:
            server = forkserver._forkserver._forkserver_pid
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            # The death of a process that the server forked is noticed when its rows are waited for.

    at_steps(kill)


def kill_writer(fault: Fault, rank: int) -> None:
    """Kill each process that writes a shard of this rank, as the kernel does when memory runs out."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(killed)


def refuse(fault: Fault, rank: int) -> None:
    """Raise an error of ours on this rank alone, before training in step 0. The rank ``stuck`` stays in a call."""
    ending._STUCK_SECONDS = 4.0
    error = DataError("rows row 7", "is refused on one rank.", "Prepare it again.")
    if fault["step"] == 0:
        from nemo_prolong.engine.training import stage_training

        def fail(*_: Any) -> None:
            raise error

        stage_training.PackedDataModule = fail  # type: ignore[assignment, misc]
        return

    def end(step: int) -> None:
        if step != fault["step"]:
            return
        if rank == fault.get("stuck"):
            time.sleep(600)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "scratch") if fault.get("by_system") else error

    at_steps(end)


FAULTS: dict[str, Callable[[Fault, int], None]] = {
    "kill_loader": kill_loader,
    "kill_writer": kill_writer,
    "refuse": refuse,
    "sigterm": functools.partial(send, signal.SIGTERM),
    "sigstop": functools.partial(send, signal.SIGSTOP),
    "nan": spoil,
    "nan_and_sigterm": spoil_and_stop,
    "kill_in_save": kill_in_save,
    "unsaved_stop": fail_saves,
    "damage": damage,
    "full_disk": refuse_growth,
    "clock": set_clock,
}


def main() -> None:
    """Run every case."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    statuses = {}
    for case in cases:
        log = str(output.with_name(case["name"]))
        # A stopped rank is the one that does not end, after the others have.
        patience = 2 if case["fault"] and case["fault"]["kind"] == "sigstop" else 30
        statuses[case["name"]] = run_ranks(functools.partial(train, case), 2, log, seconds_after_first_end=patience)
    output.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
