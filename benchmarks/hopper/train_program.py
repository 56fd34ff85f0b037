"""Train the stages of a file that ``runs.train`` wrote: ``python -m benchmarks.hopper.train_program JOBS.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.hopper.runs import jobs_of, run_jobs

if __name__ == "__main__":
    run_jobs(jobs_of(Path(sys.argv[1]).read_text()))
