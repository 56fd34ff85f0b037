"""Run scripts as a user does, each in a fork of this process: ``scripts_program.py JOBS``. NeMo is imported once.

JOBS is a JSON file of ``{"script": name without .py, "arguments": [...], "log": path}``. The exit statuses go to the
file JOBS with ``.statuses`` behind its name.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"


def main() -> None:
    """Run every job, whatever becomes of those before it."""
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imported here for all forks

    statuses = [run(job) for job in json.loads(Path(sys.argv[1]).read_text())]
    Path(f"{sys.argv[1]}.statuses").write_text(json.dumps(statuses))


def run(job: dict[str, Any]) -> int:
    """Run a script in a fork and return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = str(SCRIPTS / f"{job['script']}.py")
    sys.argv = [script, *job["arguments"]]
    runpy.run_path(script, run_name="__main__")
    # Not os._exit: the checkpoint writer's own process ends with an orderly exit only.
    sys.exit(0)


if __name__ == "__main__":
    main()
