"""Run stages one after the other, each in a process of its own, and gather what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hopper.bench import Stage
from benchmarks.hopper.records import failed

ROOT = Path(__file__).parents[2]
_LOG_LINES = 40
_ASKED_TO_STOP = "asked to stop; what it had shown by then is above."


def run_stage(stage: Stage, device: str, command: str) -> dict[str, Any]:
    """Return the report of a stage.

    Args:
        stage: The stage.
        device: ``cuda:0`` or ``cpu``.
        command: What to type to run it again; kept in the report.

    Returns:
        ``title``, ``shows``, ``command``, ``finished_at``, ``seconds``, ``machine``, ``versions``, ``commit`` and
        ``rows``. A stage that died has a failed row at the end; the end of its log is then on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        records, log = Path(directory, "records.jsonl"), Path(directory, "log")
        program = [sys.executable, "-m", "benchmarks.hopper.stage_program", stage.name, device, str(records)]
        started = time.monotonic()
        complaint = _run(program, log, stage.limit_seconds)
        seconds = round(time.monotonic() - started, 1)
        lines = [json.loads(text) for text in records.read_text().splitlines()] if records.exists() else []
        rows = lines[1:] + ([failed(stage.title, complaint).as_json()] if complaint else [])
        if any(row["result"] == "failed" for row in rows):
            tail = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            print("\n".join(["", f"end of the log of stage {stage.name}:", *tail]), file=sys.stderr)
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"title": stage.title, "shows": stage.shows, "command": command}
    return {**about, "finished_at": finished, "seconds": seconds, **(lines[0] if lines else {}), "rows": rows}


def _run(program: list[str], log: Path, limit_seconds: float) -> str:
    """Run a program to its end or its limit and return what was wrong with it, or nothing."""
    with log.open("w") as output:
        process = subprocess.Popen(
            program, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit_seconds:g} s."
        except KeyboardInterrupt:
            return _ASKED_TO_STOP
        finally:
            # Loader workers and writers of a stage are in its session; none may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"the process ended with status {status}." if status else ""


def run_stages(
    stages: list[Stage],
    device: str,
    command_of: Callable[[Stage], str],
    done: Callable[[Stage, dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Return the report of every stage by its name; after a KeyboardInterrupt, of those that have run.

    Args:
        stages: What to run, in order.
        device: ``cuda:0`` or ``cpu``.
        command_of: Returns what to type to run a stage again.
        done: Called after each stage with its report.
    """
    reports = {}
    for stage in stages:
        reports[stage.name] = report = run_stage(stage, device, command_of(stage))
        done(stage, report)
        if report["rows"] and report["rows"][-1]["note"] == _ASKED_TO_STOP:
            break
    return reports
