"""Independent tasks over a pool of processes, with progress that workers report while they work.

A task is a picklable callable without arguments. Its results lie on disk, so what is finished stays finished when the
run is killed, and the result of the whole does not depend on which process did what.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

from nemo_prolong.data.child_processes import interrupts_held_back
from nemo_prolong.data.preparation.progress import Progress
from nemo_prolong.errors import DataError

Task = Callable[[], Any]

_POLL_SECONDS = 0.2
_counter: Any = None
"""Two shared integers, (input bytes, tokens) done in this step; set once in every process."""
_progress: Progress | None = None
"""What is to be told at once where tasks run in the process that shows it."""


def count_progress(num_bytes: int = 0, tokens: int = 0) -> None:
    """Say that this much more is done; does nothing outside of ``run_tasks``."""
    if _counter is None:
        return
    with _counter.get_lock():
        _counter[0] += num_bytes
        _counter[1] += tokens
    if _progress is not None:
        _progress.advance_to(_counter[0], _counter[1])


def run_tasks(tasks: Sequence[Task], workers: int, progress: Progress) -> None:
    """Run all tasks; after a failure nothing new is started and the first error is raised.

    Args:
        tasks: What to do, in the order in which to start it.
        workers: Processes; with one, tasks run in this process.
        progress: Told of what ``count_progress`` counts.

    Raises:
        ProlongError: What a task raised.
        DataError: If a worker was killed, or the disk is full.
    """
    context = multiprocessing.get_context("spawn")
    counter = context.Array("q", 2)
    if min(workers, len(tasks)) <= 1:
        _set_counter(counter, progress)
        try:
            for task in tasks:
                task()
        finally:
            _set_counter(None)
        return
    arguments = (counter,)
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, arguments) as pool:
        try:
            # One that comes in this block is raised at its end.
            with interrupts_held_back():
                pending = {pool.submit(_call, task) for task in tasks}
            while pending:
                finished, pending = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                progress.advance_to(counter[0], counter[1])
                _raise_first_error(finished)
        except KeyboardInterrupt:
            # What they are at is lost, and a task can take minutes. What is finished lies on disk.
            for process in list(pool._processes.values()):
                process.kill()
            raise
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _raise_first_error(finished: set[Future[Any]]) -> None:
    for future in finished:
        try:
            future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "workers",
                "one of them was killed, most likely because memory ran out; what was finished is kept.",
                "Lower workers and run the same command again: it goes on from here.",
            ) from error


def _call(task: Task) -> Any:
    return task()


def _set_counter(counter: Any, progress: Progress | None = None) -> None:
    global _counter, _progress
    _counter, _progress = counter, progress


def _start_worker(counter: Any) -> None:
    _set_counter(counter)
    # One thread each: the processes already fill the cores.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent is gone: a killed run must leave no writers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn a full disk into an error that says what to do.

    Raises:
        DataError: If writing below ``directory`` failed for lack of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free_bytes = shutil.disk_usage(directory).free
        raise DataError(
            f"{directory}",
            f"has no space left ({os.strerror(error.errno)}; {free_bytes:,} bytes free); what was finished is kept.",
            "Free space and run the same command again: it goes on from here.",
        ) from error
