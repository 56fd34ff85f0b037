"""Train the stages that a JSON file describes, one after the other, in this process.

Run as ``python train_program.py JOBS.json`` or under torchrun. A job is ``{"config": RunConfig, "resume": path or null,
"parent_checkpoint": path or null}``.
"""

import json
import os
import sys
from pathlib import Path

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.logs import run_logging


def main() -> None:
    """Run every job."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        cfg = RunConfig(**job["config"])
        run_dir = Path(cfg.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with run_logging(run_dir / f"train.rank{os.environ.get('RANK', '0')}.log", console=False):
            from nemo_prolong.engine.stage_training import train_stage

            train_stage(cfg, *(Path(job[key]) if job[key] else None for key in ("resume", "parent_checkpoint")))


if __name__ == "__main__":
    main()
