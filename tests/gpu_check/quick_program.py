"""Stands in for the process that runs the cases of the quick check: ``python -m tests.gpu_check.quick_program FD``.

It serves cases as that process does, without torch. What they do is in their names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hopper.quick.case import Case
from benchmarks.hopper.quick.worker import line_writer, serve
from benchmarks.hopper.records import Row, measured


def named(name: str) -> Case:
    """Return a case that takes hardly any time."""
    return Case(name, f"Case {name}", "Shows.", "", planned_seconds=0.1)


def rows(case: Case) -> Iterator[Row]:
    what = case.name.split("-")[0]
    # Before the row, since the supervisor may end this process as soon as it has one.
    print(f"last words of {case.name}", flush=True)
    yield measured("first", os.getpid(), "")
    if what == "raises":
        raise RuntimeError("CUDA out of memory. Tried to allocate 550.00 GiB.\nAnd more.")
    if what == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hangs":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    if what == "interrupts":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    if what == "waits":
        while not Path(os.environ["SEEN"]).exists():
            time.sleep(0.01)
    yield measured("second", os.getpid(), "")


def main() -> None:
    write = line_writer(int(sys.argv[-1]))
    if sys.argv[1] == "refuses":
        print("error: no GPU here.", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1] == "fails":
        sys.exit("ImportError: libcudnn.so")
    write({"machine": {"device": "NVIDIA H200"}, "commit": "abc"})
    asked: list[Case] = []

    def cases() -> Iterator[Case]:
        for name in sys.stdin:
            asked.append(named(name.strip()))
            yield asked[-1]

    serve(cases(), rows, lambda: "the device fails." if asked[-1].name.startswith("sick") else "", write)


if __name__ == "__main__":
    main()
