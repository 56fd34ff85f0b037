"""Run cases that are named on standard input, one at a time, and write what they say to a file descriptor.

    python -m benchmarks.hopper.quick.worker DEVICE DESCRIPTOR

Each line that is written is a JSON object: first what this process runs on, then ``{"row": ...}`` for each row, and
``{"done": ...}`` after a case with what is wrong with the process now, if anything is. A process that cannot go on, as
after an error that CUDA keeps, ends there.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.hopper.quick.case import Case
from benchmarks.hopper.records import Row, attempt, not_run

if TYPE_CHECKING:
    from benchmarks.hopper.bench import Bench

_LEFT_BYTES = 2 * 2**30
"""What a case may leave on the device: tables and workspaces that libraries keep."""

Write = Callable[[dict[str, Any]], None]


def serve(
    cases: Iterable[Case],
    run: Callable[[Case], Iterator[Row]],
    complaint: Callable[[], str],
    write: Write,
) -> None:
    """Run cases until there are no more, or until the process is no longer fit for one.

    Args:
        cases: In the order in which they are asked for.
        run: Yields the rows of a case.
        complaint: Returns why the process should not run another case; empty if it may.
        write: Takes what is to be said.
    """
    for case in cases:
        for row in attempt(case.title, functools.partial(run, case)):
            write({"row": row.as_json()})
        wrong = complaint()
        write({"done": case.name, "complaint": wrong})
        if wrong:
            return


def case_rows(case: Case, bench: Bench) -> Iterator[Row]:
    """Yield the rows of a case, or that something it needs is not installed."""
    if missing := case.missing(on_gpu=bench.full):
        yield not_run(case.title, f"{', '.join(missing)} is not installed.")
        return
    yield from case.load()(bench)


def line_writer(descriptor: int) -> Write:
    """Return a function that writes an object as one line, at once."""

    def write(record: dict[str, Any]) -> None:
        os.write(descriptor, (json.dumps(record) + "\n").encode())

    return write


def main() -> None:
    """Read the command line."""
    # Not before: the imports take seconds, and a supervisor that waits for them sees this process live.
    import torch

    from benchmarks.hopper.bench import Bench
    from benchmarks.hopper.machine import check_device, environment
    from benchmarks.hopper.measure import release
    from benchmarks.hopper.quick.cases import CASES
    from nemo_prolong.errors import ConfigError

    device = torch.device(sys.argv[1])
    write = line_writer(int(sys.argv[2]))
    # Images of NVIDIA let torch multiply fp32 matrices in TF32.
    torch.set_float32_matmul_precision("highest")
    try:
        check_device(sys.argv[1])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    write(environment(device))

    def complaint() -> str:
        try:
            release(device)
            left = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        except RuntimeError as error:
            return f"the device fails: {str(error).splitlines()[0]}"
        return f"{left / 2**30:.1f} GiB were left on the device." if left > _LEFT_BYTES else ""

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        bench = Bench(device, Path(scratch))
        asked = (CASES[name.strip()] for name in sys.stdin)
        serve(asked, lambda case: case_rows(case, bench), complaint, write)


if __name__ == "__main__":
    main()
