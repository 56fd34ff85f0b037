"""Look whether this machine can run a stage, before it costs GPU hours."""

import os
import sys
from argparse import Namespace

from nemo_prolong.config.cli import request_script
from nemo_prolong.config.compose import Request
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor.examination import Doctor
from nemo_prolong.doctor.report import as_json, show
from nemo_prolong.errors import EXIT_NO_GO, CheckpointError

DESCRIPTION = """\
Look whether this machine can run a stage: driver, GPUs, versions, links, limits, disks, data, tokenizer, parent,
tokens, clocks. It takes what scripts/train.py takes, trains nothing and changes nothing. Without +exp=NAME it looks at
the machine alone. Exit code 0 is go, 7 is no go. Warnings cost something and stop nothing."""

EXAMPLES = [
    "python scripts/doctor.py                                          # this machine alone",
    "python scripts/doctor.py +exp=stage2 parent=runs/stage1           # this machine for stage 2",
    "srun --ntasks-per-node=1 python scripts/doctor.py +exp=stage2     # every node of a job, and their clocks",
    "python scripts/doctor.py +exp=mini/base --json                    # for programs",
]


def run(request: Request[RunConfig], arguments: Namespace) -> None:
    """Look, print what was found, and end with the verdict."""
    doctor = Doctor()
    examination = doctor.examine(request if request.overrides else None)
    if examination is None:
        return
    if arguments.json:
        print(as_json(examination))
    else:
        show(examination)
    code = 0 if examination.go else EXIT_NO_GO
    if doctor.is_stuck:
        # Python would wait for readings that may never end.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Read the command line."""
    request_script(
        RunConfig,
        "train",
        run,
        DESCRIPTION,
        EXAMPLES,
        help_overrides=["+exp=mini/base"],
        os_errors=CheckpointError,
        flags={"--json": "Print what was found as JSON"},
    )


if __name__ == "__main__":
    main()
