"""The nodes of a job: as many as planned, reachable, with one time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.doctor.finding import Finding, Level, good, no_go, warning
from nemo_prolong.doctor.meeting import MEET_SECONDS, MeetingError, NodeReport, meeting_port
from nemo_prolong.text import counted

_NOTICED_SECONDS = 1.0
_REFUSED_SECONDS = 300.0
"""Kerberos refuses tickets from five minutes on. S3 refuses signatures from fifteen on."""


def plan_findings(cfg: RunConfig, place: RankEnvironment) -> list[Finding]:
    """Return whether the job has the nodes that the stage is planned for."""
    planned = cfg.parallelism.num_nodes
    if planned == place.num_nodes or cfg.parallelism.planned_world_size == 1:
        return [good("nodes", f"{counted(place.num_nodes, 'node')} of the job look.")]
    return [
        no_go(
            "nodes",
            f"the job has {counted(place.num_nodes, 'node')}, and parallelism.num_nodes={planned}.",
            "With other ranks than planned the layout or the global batch may not divide.",
            f"Ask for {counted(planned, 'node')} (sbatch --nodes={planned}), or choose a layout for "
            f"{place.num_nodes}: parallelism.num_nodes={place.num_nodes}.",
        )
    ]


def meeting_findings(place: RankEnvironment, reports: Sequence[NodeReport]) -> list[Finding]:
    """Return which nodes are missing, and whether their clocks agree with that of rank 0."""
    missing = sorted(set(range(1, place.num_nodes)) - {report.node for report in reports})
    found = []
    if missing:
        numbers = ", ".join(map(str, missing))
        found.append(
            no_go(
                "nodes",
                f"{counted(len(missing), 'node')} of {place.num_nodes} gave no report within {MEET_SECONDS:.0f} s "
                f"(node {numbers}).",
                "The ranks would wait for them in the same way, and end after the timeout of the process group.",
                f"See whether the doctor runs there, and whether {place.master_address} port {meeting_port(place)} can "
                "be reached from them (name resolution, firewall).",
            )
        )
    return [*found, *_clocks(reports)]


def unreachable(error: MeetingError) -> Finding:
    """Return the finding of a node that could not talk to rank 0."""
    return no_go(
        "nodes",
        f"rank 0 cannot be reached at {error}.",
        "The ranks meet there when training starts.",
        "See whether the name resolves on this node and no firewall is between (MASTER_ADDR names the node).",
    )


def port_taken(place: RankEnvironment, error: OSError) -> Finding:
    """Return the finding of rank 0 where another program has the port of the meeting."""
    return warning(
        "nodes",
        f"port {meeting_port(place)} of rank 0 cannot be listened at ({error.strerror or error}).",
        "Clocks were not compared, and the findings of other nodes are in their own output.",
        "Set MASTER_PORT to a free port that has a free one after it.",
    )


def merged(own: Iterable[Finding], host: str, reports: Sequence[NodeReport]) -> list[Finding]:
    """Return the findings of all nodes: what rank 0's node found, and from the others what is not well.

    A finding that several nodes have in the same words is one finding with their names.
    """
    nodes: dict[Finding, list[str]] = {finding: [host] for finding in own}
    for report in reports:
        for finding in report.findings:
            if finding in nodes or finding.level is not Level.OK:
                nodes.setdefault(finding, []).append(report.host)
    return [replace(finding, nodes=tuple(dict.fromkeys(hosts))) for finding, hosts in nodes.items()]


def _clocks(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    if not reports:
        return
    worst = max(reports, key=lambda report: abs(report.clock_seconds) - report.uncertainty_seconds)
    apart = abs(worst.clock_seconds)
    certain = apart - worst.uncertainty_seconds
    way = "ahead of" if worst.clock_seconds > 0 else "behind"
    what = f"the clock of {worst.host} is {apart:.3g} s {way} that of rank 0."
    if certain <= _NOTICED_SECONDS:
        yield good("clocks", f"the clocks of the nodes agree to {max(apart, worst.uncertainty_seconds):.3f} s.")
        return
    level = no_go if certain >= _REFUSED_SECONDS else warning
    yield level(
        "clocks",
        what,
        "Logs and events of the nodes do not line up, files look older or newer than the job, and from some minutes on "
        "stores and Kerberos refuse the node.",
        "Have its time service mended (chronyc tracking, timedatectl), or leave the node out.",
    )
