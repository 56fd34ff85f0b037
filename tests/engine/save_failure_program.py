"""Train on two ranks while saves fail, in forks of this process: ``save_failure_program.py CASES.json``.

A case is ``{"config": RunConfig, "result": path}``. ``FAULTS`` says which save fails on which rank in which way. The
result holds, per rank, what the run's checkpoints were after every second step, and the error that ended the run.
"""

import errno
import functools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine import train_stage
from nemo_prolong.engine.patches import prepare
from nemo_prolong.logs import run_logging
from tests.support.fork_ranks import run_ranks

# Step -> (rank, method, error).
FAULTS = {
    4: (1, "shard_results", errno.ENOSPC),
    6: (0, "write_common", errno.EIO),
    10: (0, "write_metadata", errno.EDQUOT),
    12: (0, "_seal", errno.EROFS),
    20: (1, "shard_results", errno.EIO),
    22: (0, "write_format", errno.ENOSPC),
    24: (1, "shard_results", errno.EIO),
}
# The real thing: after this step the kernel refuses what a shard of rank 1 has beyond 16 KiB.
FILE_SIZE_LIMIT_AT = 16


def main() -> None:
    """Run every case."""
    prepare()
    from nemo_prolong.engine.training import stage_training  # noqa: F401 - imported here for all forks

    for case in json.loads(Path(sys.argv[1]).read_text()):
        if any(run_ranks(functools.partial(run_stage, case), 2, case["result"])):
            logs = (Path(f"{case['result']}.rank{rank}.log") for rank in range(2))
            sys.exit("\n".join(f"{log}\n{log.read_text()[-4000:]}" for log in logs))


def run_stage(case: dict[str, Any], rank: int) -> None:
    """Be one rank of a stage with its faults."""
    cfg = RunConfig(**case["config"])
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    with run_logging(Path(cfg.run_dir) / f"train.rank{rank}.log", console=False):
        outcome = train(cfg, rank)
    Path(f"{case['result']}.{rank}").write_text(json.dumps(outcome))


def train(cfg: RunConfig, this_rank: int) -> dict[str, Any]:
    """Train until the run stops, and return what was seen."""
    from nemo_prolong.callbacks.checkpoint_writer import CheckpointWriter
    from nemo_prolong.engine.checkpoint.megatron_io import PlannedSave
    from nemo_prolong.engine.checkpoint.save import MegatronCheckpointSave
    from nemo_prolong.errors import CheckpointError
    from nemo_prolong.records.checkpoint.verify import choose_checkpoint
    from nemo_prolong.records.run_directory import RunDirectory

    for method in ("shard_results", "write_common", "write_metadata", "write_format"):
        break_method(PlannedSave, method, this_rank)
    break_method(MegatronCheckpointSave, "_seal", this_rank)
    for method in ("write_shards", "write_shards_in_background"):
        limit_file_size(PlannedSave, method, this_rank)
    seen: list[Any] = []
    stepping = CheckpointWriter.on_step_end

    def observed(self: Any, loop: Any) -> None:
        stepping(self, loop)
        if loop.step % 2 == 0 and this_rank == 0:
            good = choose_checkpoint(Path(cfg.run_dir)).checkpoint
            names = sorted(path.name for path in (Path(cfg.run_dir) / "checkpoints").iterdir())
            seen.append([loop.step, good.name if good else None, names])

    CheckpointWriter.on_step_end = observed
    error = None
    try:
        train_stage(cfg, RunDirectory(cfg.run_dir), None, None)
    except CheckpointError as raised:
        error = str(raised)
    return {"seen": seen, "error": error}


def step_saved(save: Any) -> int:
    """Return the step of a save or of its plan."""
    return save.step if hasattr(save, "step") else int(save.checkpoint.name[5:13])


def break_method(owner: Any, method: str, this_rank: int) -> None:
    """Make a method fail as a system call does, in the saves of ``FAULTS``."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def breaking(self: Any, *args: Any) -> Any:
        result = original(self, *args) if method == "shard_results" else None
        rank, broken, code = FAULTS.get(step_saved(self), (None, None, 0))
        if (rank, broken) == (this_rank, method):
            raise OSError(code, os.strerror(code))
        return result if method == "shard_results" else original(self, *args)

    setattr(owner, method, breaking)


def limit_file_size(owner: Any, method: str, this_rank: int) -> None:
    """Let the kernel refuse large files while the shards of one save are written."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def limited(self: Any) -> Any:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step_saved(self) == FILE_SIZE_LIMIT_AT and this_rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
        try:
            return original(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    setattr(owner, method, limited)


if __name__ == "__main__":
    main()
