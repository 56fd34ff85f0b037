"""Run one stage as scripts/train.py does; ``python stage_program.py CONFIG.json [KILL_AFTER_STEP]``.

With a step, the process kills itself with SIGKILL as soon as that step is recorded: no handler runs, nothing flushed.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.stages.run import run_stage


def kill_after(step: int) -> None:
    """Arrange for the death of this process."""
    from nemo_prolong.callbacks.step_metrics import StepMetrics

    record = StepMetrics.on_train_batch_end

    def record_and_die(self: Any, trainer: Any, *args: Any) -> None:
        record(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    StepMetrics.on_train_batch_end = record_and_die


def main() -> None:
    """Run the stage."""
    if len(sys.argv) > 2:
        kill_after(int(sys.argv[2]))
    run_stage(RunConfig(**json.loads(Path(sys.argv[1]).read_text())), [])


if __name__ == "__main__":
    main()
