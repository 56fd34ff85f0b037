"""Run the programs of these tests as forks of one process, so that NeMo is imported once for all of them.

``ModuleServer.run`` is what ``python -m MODULE ARGUMENTS`` does, 12 seconds of CPU faster from the second call on. The
process has imported NeMo and nothing of ours, and a program that is started here must not need more than that: what is
to happen before NeMo is imported takes a process of its own.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]


class ModuleServer:
    """A process that forks, started with the first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout_seconds: float, cwd: Path | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a module and return its status and output.

        Args:
            arguments: The module and what is written behind it.
            environment: All variables of its process.
            timeout_seconds: A program that takes longer is killed with what it has started.
            cwd: Its working directory.

        Raises:
            subprocess.TimeoutExpired: After ``timeout_seconds``.
        """
        with tempfile.TemporaryDirectory() as directory:
            outputs = [str(Path(directory) / name) for name in ("stdout", "stderr")]
            request = {"arguments": arguments, "environment": environment, "cwd": str(cwd or ROOT), "outputs": outputs}
            status = self._status(request, timeout_seconds)
            stdout, stderr = (Path(output).read_text(errors="replace") for output in outputs)
        return subprocess.CompletedProcess(arguments, status, stdout, stderr)

    def _status(self, request: dict[str, Any], timeout_seconds: float) -> int:
        process = self._started()
        assert process.stdin and process.stdout
        process.stdin.write(f"{json.dumps(request)}\n")
        process.stdin.flush()
        group = int(process.stdout.readline())
        try:
            if not select.select([process.stdout], [], [], timeout_seconds)[0]:
                raise subprocess.TimeoutExpired(request["arguments"], timeout_seconds)
            return int(process.stdout.readline())
        except BaseException:
            os.killpg(group, signal.SIGKILL)
            process.stdout.readline()
            raise

    def _started(self) -> subprocess.Popen[str]:
        """Return the process. What it complains of while it starts goes to the errors of this one."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.module_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            atexit.register(self._process.kill)
        return self._process


def main() -> None:
    """Fork for every line of the input, and answer with the process, then with its exit status."""
    from nemo.collections import llm  # noqa: F401

    # Forks collect no garbage among what they share: it would take each of them four seconds at its end.
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            # No finally and no except: ranks that the program forks leave through here as well.
            run_as_main(request, answers)
            return
        answers.write(f"{child}\n")
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


def run_as_main(request: dict[str, Any], answers: IO[str]) -> None:
    """Become the program."""
    os.setsid()
    answers.close()
    for target, path in zip((1, 2), request["outputs"], strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    runpy.run_module(request["arguments"][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
