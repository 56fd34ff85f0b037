"""The nodes of a job compare their clocks and give what they found to one of them. Needs no torch.

One process of each node takes part. Rank 0 listens beside the port at which the ranks will meet. Each other node asks
it for the time, as NTP does, sends its findings, and waits for the verdict, so that all end with the same exit code.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.doctor.finding import Finding, Level

MEET_SECONDS = 60.0
"""How long nodes wait for each other. Containers of one job start up to a minute apart."""

_EXCHANGES = 5
"""Times that a node asks for the time. The fastest answer counts."""

_LONGEST_LINE = 2**20
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class NodeReport:
    """What one node gives.

    Attributes:
        node: Its number.
        host: Its name.
        clock_seconds: How far its clock is ahead of that of rank 0.
        uncertainty_seconds: Half of the time of the fastest answer: the true difference is within it.
        findings: What it found.
    """

    node: int
    host: str
    clock_seconds: float
    uncertainty_seconds: float
    findings: tuple[Finding, ...]

    @classmethod
    def parse(cls, content: dict[str, Any]) -> NodeReport:
        """Read what ``asdict`` and JSON made of one.

        Raises:
            ValueError, KeyError, TypeError: If it is none.
        """
        findings = [{**f, "level": Level(f["level"]), "nodes": tuple(f["nodes"])} for f in content["findings"]]
        return cls(**{**content, "findings": tuple(Finding(**finding) for finding in findings)})


class MeetingError(Exception):
    """Rank 0 could not be reached or did not answer; the text says how."""


class Meeting:
    """Rank 0's part. It listens from the start, and hands out its verdict at the end.

    Args:
        place: Of rank 0.
        job: What the nodes of this launch share, so that nobody else's are taken for them.

    Raises:
        OSError: If the port is taken.
    """

    def __init__(self, place: RankEnvironment, job: str) -> None:
        self._job = job
        self._wanted = set(range(1, place.num_nodes))
        self._reports: dict[int, NodeReport] = {}
        self._changed = threading.Condition()
        self._verdict: bool | None = None
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("", meeting_port(place)), backlog=place.num_nodes)
        threading.Thread(target=self._listen, name="doctor-meeting", daemon=True).start()

    def reports(self, seconds: float = MEET_SECONDS) -> list[NodeReport]:
        """Return what the other nodes found, waiting for all of them so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted <= self._reports.keys(), seconds)
            return [self._reports[node] for node in sorted(self._reports)]

    def end(self, go: bool, seconds: float = 5.0) -> None:
        """Tell every node the verdict."""
        with self._changed:
            self._verdict = go
            self._changed.notify_all()
        deadline = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(MEET_SECONDS)
        # A stranger at the port, or a node that dies, is nobody's report. Who is missing is known at the end.
        with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stream = connection.makefile("rw", encoding="utf-8")
            if _read(stream)["job"] != self._job:
                return
            while "ask" in (message := _read(stream)):
                _write(stream, {"time": time.time()})
            report = NodeReport.parse(message)
            with self._changed:
                self._reports[report.node] = report
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._verdict is not None, MEET_SECONDS)
            _write(stream, {"go": self._verdict})


def report_to_rank_zero(
    place: RankEnvironment, job: str, host: str, findings: Sequence[Finding], seconds: float = MEET_SECONDS
) -> tuple[NodeReport, bool]:
    """Compare clocks with rank 0 and give it what this node found.

    Args:
        place: Of this rank.
        job: As for ``Meeting``.
        host: Name of this node.
        findings: What it found.
        seconds: How long to wait for rank 0.

    Returns:
        What was sent, and whether the job may go.

    Raises:
        MeetingError: If rank 0 cannot be reached, or goes away.
    """
    address = (place.master_address, meeting_port(place))
    try:
        with _connect(address, seconds) as connection:
            connection.settimeout(seconds)
            stream = connection.makefile("rw", encoding="utf-8")
            _write(stream, {"job": job})
            ahead, uncertainty = _clock_difference(stream)
            report = NodeReport(place.node_rank, host, ahead, uncertainty, tuple(findings))
            _write(stream, asdict(report))
            return report, bool(_read(stream)["go"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeetingError(f"{address[0]}:{address[1]} ({str(error) or type(error).__name__})") from error


def meeting_port(place: RankEnvironment) -> int:
    """Return the port of the meeting, which is not the one that torchrun's store listens at."""
    return place.master_port + 1 if place.master_port < 65535 else place.master_port - 1


def _clock_difference(stream: TextIO) -> tuple[float, float]:
    """Return how far this clock is ahead in seconds, and the uncertainty of it, from the fastest of some answers."""
    answers = []
    for _ in range(_EXCHANGES):
        before = time.time()
        _write(stream, {"ask": "time"})
        theirs = float(_read(stream)["time"])
        after = time.time()
        answers.append((after - before, (before + after) / 2 - theirs))
    fastest, ahead = min(answers)
    return ahead, fastest / 2


def _connect(address: tuple[str, int], seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
        except OSError:
            # Rank 0 may not have started yet.
            if time.monotonic() + _RETRY_SECONDS > deadline:
                raise
            time.sleep(_RETRY_SECONDS)


def _read(stream: TextIO) -> dict[str, Any]:
    line = stream.readline(_LONGEST_LINE)
    if not line.endswith("\n"):
        raise ValueError("the connection ended")
    content: dict[str, Any] = json.loads(line)
    return content


def _write(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(f"{json.dumps(content)}\n")
    stream.flush()
