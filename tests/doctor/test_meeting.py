"""The nodes of a job compare clocks and give their findings to rank 0; who is missing or late is known."""

import json
import socket
import threading
import time
from dataclasses import replace

import pytest

from nemo_prolong.distributed.rank_environment import RankEnvironment
from nemo_prolong.doctor import meeting as meetings
from nemo_prolong.doctor.checks.nodes import meeting_findings, merged, plan_findings, port_taken, unreachable
from nemo_prolong.doctor.finding import Level, good, no_go
from nemo_prolong.doctor.meeting import Meeting, MeetingError, NodeReport, meeting_port, report_to_rank_zero
from tests.support.recorded_node import said, stage

SLOW = no_go("gpus", "7 GPUs here.", "One is missing.", "Leave the node out.")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def places(nodes):
    """Return the places of the first rank of some nodes of 8 ranks."""
    port = free_port()
    return [RankEnvironment(8 * node, 0, 8 * nodes, 8, "127.0.0.1", port) for node in range(nodes)]


def report(node, clock_seconds=0.0, findings=(), uncertainty_seconds=0.001):
    return NodeReport(node, f"node{node}", clock_seconds, uncertainty_seconds, tuple(findings))


def follow(place, results, job="job"):
    thread = threading.Thread(
        target=lambda: results.append(report_to_rank_zero(place, job, f"node{place.node_rank}", [SLOW], seconds=20))
    )
    thread.start()
    return thread


def test_every_node_gives_its_findings_and_gets_the_verdict():
    leader, *others = places(3)
    meeting, results = Meeting(leader, "job"), []
    threads = [follow(place, results) for place in others]
    reports = meeting.reports(20)
    meeting.end(go=False)
    for thread in threads:
        thread.join()
    assert [(got.node, got.host, got.findings) for got in reports] == [(1, "node1", (SLOW,)), (2, "node2", (SLOW,))]
    assert [go for _, go in results] == [False, False]
    # They have one clock.
    assert all(abs(got.clock_seconds) <= got.uncertainty_seconds + 0.01 for got in reports)


def test_a_clock_that_is_ahead_is_measured(monkeypatch):
    leader, other = places(2)
    meeting, results = Meeting(leader, "job"), []
    now = time.time

    def clock():
        return now() + (90 if threading.current_thread().name == "ahead" else 0)

    monkeypatch.setattr(meetings.time, "time", clock)
    thread = threading.Thread(
        target=lambda: results.append(report_to_rank_zero(other, "job", "node1", [], seconds=20)), name="ahead"
    )
    thread.start()
    (got,) = meeting.reports(20)
    meeting.end(go=True)
    thread.join()
    assert got.clock_seconds == pytest.approx(90, abs=1)
    assert results[0][1] is True


def test_a_stranger_at_the_port_is_nobodys_report():
    leader, other = places(2)
    meeting, results = Meeting(leader, "job"), []
    for text in ('{"job": "another"}\n', "GET / HTTP/1.1\r\n\r\n", "[]\n", '{"job": "job"}\n{"node": 1}\n'):
        with socket.create_connection(("127.0.0.1", meeting_port(leader))) as stranger:
            stranger.sendall(text.encode())
            assert stranger.makefile().read() == ""
    thread = follow(other, results)
    assert [got.node for got in meeting.reports(20)] == [1]
    meeting.end(go=True)
    thread.join()


def test_a_node_that_does_not_come_is_not_waited_for_longer_than_told():
    leader, _ = places(2)
    meeting = Meeting(leader, "job")
    assert meeting.reports(0.05) == []
    meeting.end(go=False)


def test_rank_zero_that_cannot_be_reached_is_an_error():
    (leader,) = places(1)
    with pytest.raises(MeetingError, match=f"127.0.0.1:{meeting_port(leader)} .*refused"):
        report_to_rank_zero(leader, "job", "node1", [], seconds=0.1)


def test_a_report_is_the_same_after_its_way():
    sent = report(1, 0.5, [SLOW, good("cpus", "224 processors.")])
    text = json.dumps({"node": 1, "host": "node1", "clock_seconds": 0.5, "uncertainty_seconds": 0.001,
                       "findings": [vars(finding) for finding in sent.findings]})  # fmt: skip
    assert NodeReport.parse(json.loads(text)) == sent


def test_the_last_port_has_one_before_it():
    assert meeting_port(RankEnvironment(master_port=65535)) == 65534


def test_a_missing_node_is_a_no_go():
    place = replace(places(3)[0], master_address="gpu-01", master_port=29500)
    finding, clocks = meeting_findings(place, [report(2)])
    assert (finding.level, clocks.level) == (Level.NO_GO, Level.OK)
    assert said(finding) == (
        "1 node of 3 gave no report within 60 s (node 1).\n"
        "The ranks would wait for them in the same way, and end after the timeout of the process group.\n"
        "See whether the doctor runs there, and whether gpu-01 port 29501 can be reached from them (name resolution, "
        "firewall)."
    )


@pytest.mark.parametrize(
    ("seconds", "level", "what"),
    [
        (0.02, Level.OK, "the clocks of the nodes agree to 0.020 s."),
        (2.5, Level.WARNING, "the clock of node2 is 2.5 s ahead of that of rank 0."),
        (-2.5, Level.WARNING, "the clock of node2 is 2.5 s behind that of rank 0."),
        (301.0, Level.NO_GO, "the clock of node2 is 301 s ahead of that of rank 0."),
    ],
)
def test_clocks_that_differ(seconds, level, what):
    (finding,) = meeting_findings(places(3)[0], [report(1), report(2, seconds)])
    assert (finding.name, finding.level, finding.what) == ("clocks", level, what)
    assert level is Level.OK or "chronyc tracking" in finding.remedy


def test_a_slow_answer_is_no_difference_of_clocks():
    (finding,) = meeting_findings(places(2)[0], [report(1, 1.5, uncertainty_seconds=1.0)])
    assert finding.level is Level.OK


def test_findings_in_the_same_words_are_one_with_the_names_of_the_nodes():
    fine = good("cpus", "224 processors.")
    own = good("gpus", "8 GPUs here.")
    found = merged([own, fine], "node0", [report(1, 0, [SLOW, fine]), report(2, 0, [SLOW, good("gpus", "9 GPUs.")])])
    assert found == [
        replace(own, nodes=("node0",)),
        replace(fine, nodes=("node0", "node1")),
        replace(SLOW, nodes=("node1", "node2")),
    ]


def test_a_job_of_other_nodes_than_planned():
    (finding,) = plan_findings(stage("stage2"), places(4)[0])
    assert finding.level is Level.NO_GO
    assert said(finding) == (
        "the job has 4 nodes, and parallelism.num_nodes=8.\n"
        "With other ranks than planned the layout or the global batch may not divide.\n"
        "Ask for 8 nodes (sbatch --nodes=8), or choose a layout for 4: parallelism.num_nodes=4."
    )


@pytest.mark.parametrize("cfg", [stage("stage2"), stage("mini/base")])
def test_a_job_of_the_planned_nodes_and_one_without_a_plan(cfg):
    (finding,) = plan_findings(cfg, places(8)[0])
    assert (finding.level, finding.what) == (Level.OK, "8 nodes of the job look.")


def test_what_keeps_nodes_from_meeting_is_said_with_the_port():
    place = RankEnvironment(master_address="gpu-01", master_port=29500)
    assert "port 29501 of rank 0 cannot be listened at (Address already in use)." in said(
        port_taken(place, OSError(98, "Address already in use"))
    )
    assert unreachable(MeetingError("gpu-01:29501 (timed out)")).what == (
        "rank 0 cannot be reached at gpu-01:29501 (timed out)."
    )
