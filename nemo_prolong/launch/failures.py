"""What a job does after its ranks have failed: which node is to blame, and whether the job goes back into the queue.

The job file asks ``scripts/judge_failure.py``, with what its ranks and srun wrote to stderr. Three things name a node.
They are asked in this order, because ranks that lose a peer end too.

1. A line of the kernel about an error of its GPU (Xid).
2. A hang in which its ranks wrote no stacks, or others than the rest.
3. The first rank that ended by a signal, or with an exit code that is not one of ours.

A node that is named in as many failures of a job as ``cluster.exclude_after_failures`` says is excluded. Both are
events of the run.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nemo_prolong.errors import (
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    TrainingError,
)
from nemo_prolong.files import append_line
from nemo_prolong.launch.parts import LAUNCH_DIRECTORY
from nemo_prolong.records.checkpoint.manifest import listed_steps
from nemo_prolong.records.run_directory import RunDirectory

FAILURES_FILE = "failures.jsonl"

_OUR_CODES = {
    *(EXIT_HUNG, EXIT_INTERRUPTED, EXIT_PREEMPTED),
    *(error.exit_code for error in (ConfigError, DataError, CheckpointError, ExportError, TrainingError)),
}
"""Exit codes that say what is wrong, and it is not the node."""

_SOFTWARE_XIDS = {13, 31, 43, 45}
"""Xids of programs: an illegal access, a page fault, a program that stopped, and the cleanup after any of them
(https://docs.nvidia.com/deploy/xid-errors)."""

_XID = re.compile(r"(?P<node>[\w.-]+): .*NVRM: Xid \([^)]*\): (?P<xid>\d+)")
_EXIT = re.compile(r"srun: error: (?P<node>[^:]+): tasks? (?P<tasks>[^:]+): (?P<how>.+)")
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)
_MAIN = re.compile(r'in <module>\s*\Z|File ".*/scripts/\w+\.py"')


class Failure(BaseModel):
    """One end of the ranks of a job, a line of ``failures.jsonl``.

    Attributes:
        time: When it was judged, in Unix seconds.
        job: Number of the job, which a requeued job keeps.
        restart: How often the job had been requeued.
        code: Exit code of srun.
        hung: Whether a rank ended itself because it made no progress.
        saved: Whether a checkpoint was saved since the job began this time.
        nodes: Nodes to blame, and why.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float
    job: str
    restart: int
    code: int
    hung: bool
    saved: bool
    nodes: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """What the job does next.

    Attributes:
        requeue: Whether it goes back into the queue.
        excluded: Nodes that it is to do without from now on.
    """

    requeue: bool
    excluded: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'requeue' if self.requeue else 'end'} {','.join(self.excluded)}".rstrip()


def nodes_to_blame(errors: str, stacks: Mapping[int, str], nodes: Sequence[str], ranks_per_node: int) -> dict[str, str]:
    """Return the nodes that a failure names, and why each; none where it names none or all.

    Args:
        errors: What ranks and srun wrote to stderr since the job began, and lines of the kernel after their node.
        stacks: Rank and content of the stacks that were written since.
        nodes: Nodes of the job in the order of the ranks.
        ranks_per_node: Ranks of each.
    """
    for named in (
        _broken_gpus(errors, nodes),
        _odd_stacks(stacks, nodes, ranks_per_node),
        {} if stacks else _first_exit(errors, nodes),
    ):
        if named and len(named) < len(nodes):
            return named
    return {}


def _broken_gpus(errors: str, nodes: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for match in _XID.finditer(errors):
        if match["node"] in nodes and int(match["xid"]) not in _SOFTWARE_XIDS:
            found.setdefault(match["node"], f"Xid {match['xid']} in its kernel's log")
    return found


def _first_exit(errors: str, nodes: Sequence[str]) -> dict[str, str]:
    """Return the node whose rank ended first, unless ranks of several did so together or said why."""
    first = _EXIT.search(errors)
    if first is None or first["node"] not in nodes:
        return {}
    code = _EXIT_CODE.match(first["how"])
    if code is not None and int(code[1]) in _OUR_CODES:
        return {}
    return {first["node"]: f"rank {first['tasks']} ended first: {first['how'].strip()}"}


def _odd_stacks(stacks: Mapping[int, str], nodes: Sequence[str], ranks_per_node: int) -> dict[str, str]:
    """Return the nodes whose ranks wrote no stacks in a hang, else the one whose ranks stand where no others do."""
    if not stacks:
        return {}
    silent = [rank for rank in range(len(nodes) * ranks_per_node) if rank not in stacks]
    if silent:
        return {nodes[rank // ranks_per_node]: f"rank {rank} wrote no stacks in a hang" for rank in reversed(silent)}
    places = {rank: _place(text) for rank, text in stacks.items()}
    (usual, _), *others = Counter(places.values()).most_common()
    odd = {rank: place for rank, place in places.items() if place != usual}
    at = {nodes[rank // ranks_per_node] for rank in odd}
    if len(at) != 1 or not others or len(odd) * 2 >= len(places):
        return {}
    rank, place = next(iter(odd.items()))
    return {at.pop(): f"rank {rank} hung in {place}, the others in {usual}"}


def _place(stacks: str) -> str:
    """Return the innermost frame of the main thread in what faulthandler wrote, without its line number."""
    threads = _THREAD.split(stacks)[1:]
    main = next((thread for thread in threads if _MAIN.search(thread)), threads[-1] if threads else "")
    frame = re.search(r'File "(?:.*/)?([^"/]+)", line \d+ in (\S+)', main)
    return f"{frame[2]} ({frame[1]})" if frame else "an unknown place"


def judge(run: RunDirectory, failure: Failure, exclude_after: int | None) -> Verdict:
    """Record a failure and return what the job does next.

    Ranks that hung are started again if a checkpoint was saved since they began. So are ranks that a node let down. As
    many failures as exclude a node may come before a save, because only then another node has its chance.

    Args:
        run: Run directory.
        failure: What happened.
        exclude_after: Failures that name a node after which it is excluded; None excludes none.
    """
    path = run.path / LAUNCH_DIRECTORY / FAILURES_FILE
    failures = [*_earlier(path, failure.job), failure]
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, failure.model_dump_json())
    step = max(listed_steps(run.path), default=0)
    for node, why in failure.nodes.items():
        run.record_event(step, "node_failed", f"{node}: {why}")
    if exclude_after is None:
        return Verdict(failure.hung and failure.saved)
    counts = Counter(node for earlier in failures for node in earlier.nodes)
    excluded = tuple(node for node in failure.nodes if counts[node] == exclude_after)
    fruitless = len(list(_since_last_save(failures)))
    named_early = bool(failure.nodes) and fruitless <= exclude_after
    verdict = Verdict((failure.saved and (failure.hung or bool(failure.nodes))) or named_early, excluded)
    for node in excluded if verdict.requeue else ():
        run.record_event(step, "node_excluded", f"{node} was named in {exclude_after} failures of job {failure.job}")
    return verdict


def _since_last_save(failures: Sequence[Failure]) -> Iterator[Failure]:
    for failure in reversed(failures):
        if failure.saved:
            return
        yield failure


def _earlier(path: Path, job: str) -> list[Failure]:
    """Return the failures of a job so far. A job of another number may have other nodes under the same names."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    failures = [Failure.model_validate(json.loads(line)) for line in lines if line.strip()]
    return [failure for failure in failures if failure.job == job]


def explain(run: RunDirectory, failure: Failure, verdict: Verdict) -> Iterator[str]:
    """Yield what a person who reads the log of the job wants to know."""
    if failure.hung:
        yield f"ranks hung, see {run.path}/stacks.rank*.txt"
    for node, why in failure.nodes.items():
        yield f"{node} is to blame: {why}"
    if verdict.requeue:
        progress = "has saved a checkpoint since it began" if failure.saved else "has saved nothing since it began"
        without = f" without {', '.join(verdict.excluded)}" if verdict.excluded else ""
        yield f"the job {progress} and is requeued{without}"


def stacks_since(run: RunDirectory, ranks: int, started: float) -> dict[int, str]:
    """Return the stacks that ranks wrote since a job began. What an earlier job left says nothing about this one.

    Args:
        run: Run directory.
        ranks: Number of ranks.
        started: Unix time in seconds.
    """
    paths = {rank: run.stacks_file(rank) for rank in range(ranks)}
    return {
        rank: path.read_text(errors="replace")
        for rank, path in paths.items()
        if path.is_file() and path.stat().st_mtime >= started
    }


def saved_since(run: RunDirectory, started: float) -> bool:
    """Return whether a checkpoint was saved since a Unix time in seconds."""
    return any(path.stat().st_mtime >= started for path in run.path.glob("checkpoints/step_*"))
