"""Have two ranks continue from checkpoints as they are: ``payload_program.py CASES.json OUTPUT``.

A case is ``{"name": str, "config": RunConfig, "resume": path or null, "parent_checkpoint": path or null}``. The output
is {case: exit statuses of the ranks}; what they said is in ``NAME.rankN.log`` beside it. NeMo is imported once.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.fork_ranks import run_ranks


def train(case: dict[str, Any], rank: int) -> None:
    """Be one rank of a case."""
    from nemo_prolong.engine import train_stage

    paths = [Path(case[key]) if case[key] else None for key in ("resume", "parent_checkpoint")]
    try:
        cfg = RunConfig(**case["config"])
        train_stage(cfg, RunDirectory(cfg.run_dir), *paths)
    except CheckpointError as error:
        print(error, flush=True)
        # Taking NeMo apart takes longer than the refusal.
        os._exit(error.exit_code)


def main() -> None:
    """Run every case."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    statuses = {
        case["name"]: run_ranks(
            functools.partial(train, case), 2, str(output.with_name(case["name"])), seconds_after_first_end=30
        )
        for case in cases
    }
    output.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
