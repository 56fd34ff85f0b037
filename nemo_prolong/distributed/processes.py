"""The ranks of this machine as processes that live and end with the one that starts them. Needs no torch.

torchrun and its agent (``torch.distributed.launcher.api``) end the ranks in another way than they need here. The agent
of torch 2.13 answers a signal by sending it on and kills what is left 30 seconds later, in the middle of a save. The
ranks' exit codes are then lost, and SIGUSR1 ends the agent itself. Ranks outlive an agent that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.errors import EXIT_INTERRUPTED

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_POLL_SECONDS = 0.1
_SECONDS_AFTER_FIRST_FAILURE = 30.0
"""How long the others may go on when one has failed. They end by themselves when they know, see ``ending``."""
_SECONDS_AFTER_INTERRUPT = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def run_ranks(ranks: int) -> int:
    """Run the command of this process as several ranks on this machine.

    SIGTERM and SIGUSR1 are handed on, Ctrl-C too. Output goes where that of this process goes.

    Args:
        ranks: How many.

    Returns:
        0, or the exit code of the first rank that ended otherwise; 128 more than the number of the signal for one that
        a signal ended. ``EXIT_INTERRUPTED`` after Ctrl-C.
    """
    with handing_on_signals() as processes:
        try:
            processes.start([sys.executable, *sys.orig_argv[1:]], ranks)
            return exit_code(processes.wait())
        except KeyboardInterrupt:
            processes.interrupt()
            return EXIT_INTERRUPTED
        finally:
            processes.kill()


def exit_code(status: int) -> int:
    """Return what a shell would say of a status of ``RankProcesses.wait``."""
    return status if status >= 0 else 128 - status


class RankProcesses:
    """Some ranks, which get the signals that this process gets and die with it.

    Attributes:
        received: The request to stop that this process has received, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._processes: list[subprocess.Popen[bytes]] = []

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Remember a request to stop. It is handed on from ``wait``, where no process is just being started."""
        self.received = signal.Signals(number)

    def start(self, command: Sequence[str], ranks: int) -> None:
        """Start a command on some ranks. One alone is a plain process, several are what torchrun would start."""
        port = _free_port() if ranks > 1 else 0
        for rank in range(ranks):
            if self.received is None:
                # The ranks read nothing. A session of their own keeps Ctrl-C from them, which is handed on once.
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=_environment(rank, ranks, port),
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                        preexec_fn=_die_with(os.getpid()),
                    )
                )

    def wait(self) -> int:
        """Return 0, or the exit status of the first rank that failed. What is left after that is killed in time.

        The status of a rank that a signal ended is the negative number of the signal.
        """
        first, deadline, handed_on = 0, float("inf"), False
        while None in (codes := [process.poll() for process in self._processes]) and time.monotonic() < deadline:
            if self.received is not None and not handed_on:
                self._send(self.received)
                handed_on = True
            if not first and any(codes):
                first, deadline = next(filter(None, codes)), time.monotonic() + _SECONDS_AFTER_FIRST_FAILURE
            time.sleep(_POLL_SECONDS)
        return first or next(filter(None, codes), 0)

    def interrupt(self) -> None:
        """Hand Ctrl-C on, and give the ranks the time to end their own processes."""
        self._send(signal.SIGINT)
        deadline = time.monotonic() + _SECONDS_AFTER_INTERRUPT
        while any(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End what is left, after a failure or an interrupt."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._processes.clear()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


@contextmanager
def handing_on_signals() -> Iterator[RankProcesses]:
    """Receive requests to stop while ranks run. Outside the main thread Python allows no handlers."""
    processes = RankProcesses()
    if threading.current_thread() is not threading.main_thread():
        yield processes
        return
    previous = {number: signal.signal(number, processes.receive) for number in _STOP_SIGNALS}
    try:
        yield processes
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return dict(os.environ)
    place = RankEnvironment(rank, rank, ranks, ranks, master_port=port)
    # Threads of ranks that share the cores would wait for each other. torchrun sets the same.
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **place.variables()}


def _die_with(parent: int) -> Callable[[], None]:
    """Return what has the kernel kill a child when its parent dies. Two processes must not train one run."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
