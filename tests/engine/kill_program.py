"""Kill a run with SIGKILL at given moments and start it again: ``kill_program.py SPEC.json``.

The specification is ``{"config": RunConfig, "points": [...], "shares": [...], "result": path}``; after a share of the
uninterrupted run's time a run is killed. NeMo is imported once; every run is a fork of this process. Two scenarios are
under way at a time.
"""

import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.records.checkpoint.verify import choose_checkpoint

KILLED_STEP = 4


def main() -> None:
    """Run the uninterrupted run and every scenario, and write what was seen."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    spec = json.loads(Path(sys.argv[1]).read_text())
    started = time.monotonic()
    assert wait(fork(lambda: train(spec, "whole"))) == 0
    whole_seconds = time.monotonic() - started
    scenarios = [(f"at_{point}", point, None) for point in spec["points"]]
    scenarios += [(f"after_{index}", None, share * whole_seconds) for index, share in enumerate(spec["shares"])]
    halves = [scenarios[half::2] for half in range(2)]
    workers = [
        fork(lambda half=half, index=index: write(spec, index, [kill_and_repeat(spec, *s) for s in half]))
        for index, half in enumerate(halves)
    ]
    assert [wait(worker) for worker in workers] == [0, 0]


def write(spec: dict[str, Any], index: int, seen: list[dict[str, Any]]) -> None:
    """Write what one worker saw."""
    Path(f"{spec['result']}.{index}").write_text(json.dumps(seen))


def kill_and_repeat(spec: dict[str, Any], name: str, point: str | None, delay_seconds: float | None) -> dict[str, Any]:
    """Kill one run, look at what it leaves, and repeat its command."""
    process = fork(lambda: train(spec, name, point))
    if delay_seconds is not None:
        time.sleep(delay_seconds)
        os.kill(process, signal.SIGKILL)
    killed = wait(process)
    run_dir = Path(spec["config"]["runs_dir"]) / name
    left = sorted(path.name for path in (run_dir / "checkpoints").glob("*"))
    checkpoint = choose_checkpoint(run_dir).checkpoint if run_dir.exists() else None
    finished = (run_dir / "stage.json").is_file() and json.loads((run_dir / "stage.json").read_text())["status"]
    repeated = 0 if finished == "complete" else wait(fork(lambda: train(spec, name)))
    return {
        "name": name,
        "killed": killed,
        "left": left,
        "resumed": checkpoint.name if checkpoint else None,
        "repeated": repeated,
    }


def fork(action: Callable[[], None]) -> int:
    """Run an action in a fork of this process and return its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)
    return 0


def wait(process: int) -> int:
    """Return the exit code of a fork, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train(spec: dict[str, Any], name: str, point: str | None = None) -> None:
    """Run the stage; die at the point in the save of ``KILLED_STEP``."""
    from nemo_prolong.stages.run import run_stage

    if point is not None:
        arm(point)
    run_stage(RunConfig(**{**spec["config"], "name": name}), [])


def arm(point: str) -> None:
    """Arrange for the death of the training process at a point of the save path."""
    from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter

    trainer = os.getpid()
    current = {"step": 0}

    def reached(self: Any, here: str) -> None:
        current["step"] = self._saved_step
        if here == point and self._saved_step == KILLED_STEP:
            os.kill(trainer, signal.SIGKILL)

    CheckpointWriter.reached = reached
    if point == "half_a_deletion":
        arm_deletion(trainer)
    elif point in ("half_a_shard", "one_of_two_shards"):
        arm_shards(point, trainer, current)


def arm_shards(point: str, trainer: int, current: dict[str, int]) -> None:
    """Kill from a process that writes: in the middle of its shard, or instead of writing the second one."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write_item = filesystem_async._write_item
    write_shard = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    items = iter(range(1000))

    @functools.wraps(write_item)
    def half_a_shard(*args: Any, **kwargs: Any) -> Any:
        if current["step"] == KILLED_STEP and next(items) == 5:
            os.kill(trainer, signal.SIGKILL)
        return write_item(*args, **kwargs)

    def one_of_two_shards(transforms: Any, local_proc_idx: int, *args: Any, **kwargs: Any) -> Any:
        if current["step"] == KILLED_STEP and local_proc_idx == 1:
            os.kill(trainer, signal.SIGKILL)
            os._exit(1)
        return write_shard(transforms, local_proc_idx, *args, **kwargs)

    if point == "half_a_shard":
        filesystem_async._write_item = half_a_shard
    else:
        filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(one_of_two_shards)


def arm_deletion(trainer: int) -> None:
    """Kill when the first file of an old checkpoint is gone."""
    remove_tree = shutil.rmtree

    def half_a_deletion(path: Path, *args: Any, **kwargs: Any) -> None:
        if ".deleting-" in Path(path).name:
            (Path(path) / "weights" / "common.pt").unlink()
            os.kill(trainer, signal.SIGKILL)
        remove_tree(path, *args, **kwargs)

    shutil.rmtree = half_a_deletion


if __name__ == "__main__":
    main()
